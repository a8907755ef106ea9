"""Tests of tools/dist_train.sh and tools/dist_test.sh, without a GPU."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
from mmengine.config import Config
from support.dist_train import (
    assert_equal_bits,
    differing,
    load_states,
)
from support.processes import run_tool_in_forks
from support.tools import ROOT, run_tool
from support.toy import make_config
from support.toy_samples import sample_dataloader
from torch import nn
from torch.multiprocessing import ProcessExitedException

from mmactnn.mmlab.launch import (
    CPUDistributedDataParallel,
    leave_process_group,
)

TOOLS = ROOT / 'tools'


def write_toy(path, *hooks, **kwargs):
    """Write the config of a toy, which imports little."""
    cfg = make_config(
        path.parent / 'work_dir', *hooks, dict(type='RankStateHook'), **kwargs
    )
    cfg['custom_imports'] = dict(
        imports=['support.rank_state', 'support.toy_samples']
    )
    Config(cfg).dump(path)
    return path


@pytest.fixture(scope='module')
def story(tmp_path_factory):
    """A training that two processes begin, one goes on with, and two end.

    Returns:
        SimpleNamespace: ``config``; and for each part ``lasts``, what it
        went on with, ``states`` of its processes, and ``logs``.
    """
    folder = tmp_path_factory.mktemp('story')
    work_dir = folder / 'work_dir'
    evaluated = dict(type='ToySamples', size=12)
    config = write_toy(
        folder / 'toy.py',
        dict(type='ActNNHook', level=dict(fuse=False, use_gradient=True)),
        dict(type='KillRankHook'),
        model=dict(type='SampleClassifier'),
        train_dataloader=sample_dataloader(
            dict(type='ToySamples', size=24), batch_size=2
        ),
        val_dataloader=sample_dataloader(evaluated, shuffle=False),
        test_dataloader=sample_dataloader(evaluated, shuffle=False),
        epochs=2,
        evaluates=True,
    )
    # In the second epoch, of 6 iterations.
    kill = ['--cfg-options', 'custom_hooks.1.iteration=8']
    with pytest.raises(ProcessExitedException, match='SIGKILL'):
        run_tool_in_forks('train.py', config, *kill, ranks=2, cwd=folder)
    found = SimpleNamespace(config=config, lasts=[], states=[], logs=[])
    for epoch in (2, 3):
        path = work_dir / f'epoch_{epoch - 1}.pth'
        found.lasts.append(torch.load(path, weights_only=False))
        options = ['--resume', '--cfg-options', 'randomness.seed=7']
        options.append(f'train_cfg.max_epochs={epoch}')
        if epoch == 3:
            options.append('sync_bn=torch')
        ranks = epoch - 1
        log = run_tool_in_forks(
            'train.py', config, *options, ranks=ranks, cwd=folder
        )
        found.states.append(load_states(work_dir, ranks))
        found.logs.append(log)
    return found


@pytest.mark.parametrize('part', [0, 1])
def test_goes_on_with_another_number_of_ranks(story, part):
    last, states = story.lasts[part], story.states[part]
    assert len(states) == part + 1
    for rank, state in enumerate(states):
        started = state['started']
        # Of 6 iterations with two processes, and of 12 with one.
        assert started['iteration'] == (6, 18)[part]
        assert started['rounding']['seed'] == 5
        assert started['rounding']['stream'] == rank
        torch.testing.assert_close(
            started['precision'],
            last['actnn']['precision'],
            rtol=0,
            atol=0,
        )
    # Something to go on with: bits have moved, gradients are known.
    assert len(set(last['actnn']['precision']['bits'].values())) > 1
    assert last['actnn']['precision']['history'].unique().numel() > 4


def test_two_ranks_and_sync_bn(story):
    assert 'communicate through gloo, not through nccl' in story.logs[-1]
    assert 'SyncBatchNorm -> QSyncBatchNorm' in story.logs[-1]
    # The running statistics, too.
    assert differing(story.states[-1]) == set()
    assert_equal_bits(story.states[-1])


def test_two_ranks_evaluate(story):
    """As two did at the end of their training, each half of the images."""
    folder = story.config.parent
    checkpoint = folder / 'work_dir' / 'epoch_3.pth'
    log = run_tool_in_forks(
        'test.py', story.config, checkpoint, ranks=2, cwd=folder
    )
    found, expected = (
        re.findall(r'mean: (-?[\d.]+)', text)[-1]
        for text in (log, story.logs[-1])
    )
    assert found == expected
    # Of 3 batches, which one would need.
    assert re.search(r'Epoch\(test\) *\[2/2\]', log)


PRINTER = """#!/usr/bin/env bash
echo "$PYTHONPATH"
printf '%s\n' "$@"
"""


@pytest.mark.parametrize(
    ('tool', 'arguments'), [('train', []), ('test', ['epoch_1.pth'])]
)
def test_nodes_and_arguments_of_the_command_lines(tool, arguments, tmp_path):
    """Arguments of torch's launcher, in whose place a script runs."""
    python = tmp_path / 'python'
    python.write_text(PRINTER)
    python.chmod(0o755)
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    nodes = dict(NNODES='3', NODE_RANK='2', MASTER_ADDR='there', PORT='1234')
    given = ['a config.py', *arguments, '4', '--amp', '--work-dir', 'a b']
    lines = {}
    for name, environ in dict(one={}, three=nodes).items():
        command = ['bash', str(TOOLS / f'dist_{tool}.sh'), *given]
        environ = dict(environ, PATH=path, PYTHONPATH='mine')
        found = subprocess.check_output(command, text=True, env=environ)
        lines[name] = found.splitlines()
    for name, address in dict(
        one=('1', '0', '127.0.0.1', '29500'),
        three=('3', '2', 'there', '1234'),
    ).items():
        root, *words = lines[name]
        assert root.split(os.pathsep) == [f'{TOOLS}/..', 'mine']
        assert words == [
            *('-m', 'torch.distributed.run'),
            f'--nnodes={address[0]}',
            f'--node_rank={address[1]}',
            f'--master_addr={address[2]}',
            f'--master_port={address[3]}',
            '--nproc_per_node=4',
            *(f'{TOOLS}/{tool}.py', 'a config.py', *arguments),
            *('--launcher', 'pytorch', '--amp', '--work-dir', 'a b'),
        ]
        # As torch reads it.
        parser = torch.distributed.run.get_args_parser()
        config, *_ = torch.distributed.run.config_from_args(
            parser.parse_args(words[2:])
        )
        assert config.nproc_per_node == 4
        assert config.min_nodes == config.max_nodes == int(address[0])
        assert config.rdzv_configs['rank'] == int(address[1])
        assert config.rdzv_endpoint == ':'.join(address[2:])


STARTED = """#!/usr/bin/env bash
printf '%s\n' "$@" > "rank$RANK.txt"
echo "$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR" >> "rank$RANK.txt"
"""


def test_launcher_starts_what_is_run_in_forks_here(tmp_path, monkeypatch):
    """Torch's launcher, which starts a script in place of Python."""
    python = tmp_path / 'python'
    python.write_text(STARTED)
    python.chmod(0o755)
    monkeypatch.setenv('PYTHON_EXEC', str(python))
    run_tool('dist_train.sh', 'some.py', 2, '--resume', cwd=tmp_path)
    for rank in (0, 1):
        _, script, *words = (tmp_path / f'rank{rank}.txt').read_text().split()
        assert os.path.samefile(script, TOOLS / 'train.py')
        assert words == [
            *('some.py', '--launcher', 'pytorch', '--resume'),
            *('2', str(rank), '127.0.0.1'),
        ]


def test_leaving_a_process_group(tmp_path):
    leave_process_group()  # of no distributed job
    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    # As a runner holds its model, and the model the group.
    holder = [CPUDistributedDataParallel(nn.Linear(2, 2))]
    holder.append(holder)
    assert 'pt_gloo_runloop' in names_of_threads()
    del holder
    leave_process_group()
    assert not dist.is_initialized()
    assert 'pt_gloo_runloop' not in names_of_threads()


def names_of_threads():
    """Threads of this process, including those of libraries."""
    files = Path('/proc/self/task').glob('*/comm')
    return {file.read_text().strip() for file in files}
