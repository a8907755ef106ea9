"""Tests of tools/dist_train.sh and tools/dist_test.sh, without a GPU."""

from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from support.dist_train import (
    assert_equal_bits,
    differing,
    load_states,
    train,
)
from support.tools import run_tool
from support.toy import make_config
from torch import nn

from mmactnn.mmlab.launch import (
    CPUDistributedDataParallel,
    leave_process_group,
)


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


def test_two_nodes_and_sync_bn(tmp_path):
    config = write_toy(
        tmp_path / 'toy.py', dict(type='ActNNHook'), evaluates=True
    )
    options = '--cfg-options', 'sync_bn=torch'
    _, states = train(config, 1, *options, cwd=tmp_path, nodes=2)
    # The running statistics, too.
    assert differing(states) == set()
    assert_equal_bits(states)

    checkpoint = tmp_path / 'work_dir' / 'epoch_1.pth'
    log = run_tool(
        'dist_test.sh', config, checkpoint, 1, cwd=tmp_path, nodes=2
    )
    assert 'mean:' in log


def test_goes_on_with_another_number_of_ranks(tmp_path):
    work_dir = tmp_path / 'work_dir'
    config = write_toy(
        tmp_path / 'toy.py',
        dict(type='ActNNHook', level=dict(fuse=False, use_gradient=True)),
        dict(type='KillRankHook'),
        model=dict(type='SampleClassifier'),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=True),
            dataset=dict(type='ToySamples', size=24),
            collate_fn=dict(type='pseudo_collate'),
        ),
        epochs=2,
    )
    # In the second epoch, of 6 iterations.
    kill = ['--cfg-options', 'custom_hooks.1.iteration=8']
    log = run_tool('dist_train.sh', config, 2, *kill, cwd=tmp_path, fails=True)
    assert 'Signal 9 (SIGKILL)' in log

    iteration, seed = 6, 5
    for epoch, ranks in enumerate((1, 3), start=2):
        last = torch.load(
            work_dir / f'epoch_{epoch - 1}.pth', weights_only=False
        )
        options = ['--resume', '--cfg-options', 'randomness.seed=7']
        options.append(f'train_cfg.max_epochs={epoch}')
        if ranks == 1:
            run_tool('train.py', config, *options, cwd=tmp_path)
            states = load_states(work_dir, 1)
        else:
            _, states = train(config, ranks, *options, cwd=tmp_path)
        for rank, state in enumerate(states):
            started = state['started']
            assert started['iteration'] == iteration
            assert started['rounding']['seed'] == seed
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
        assert all('running_' in key for key in differing(states))
        assert_equal_bits(states)
        iteration += 12 // ranks


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
