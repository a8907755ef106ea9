"""Tests of tools/dist_train.sh and tools/dist_test.sh, without a GPU."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from support.tools import ROOT

CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=['mmactnn', 'support.rank_state'])
custom_hooks = [
    dict(type='ActNNHook', level='L3'),
    dict(type='RankStateHook'),
]
# Nothing is sure yet after so few iterations: keep every prediction.
model = dict(test_cfg=dict(score_thr=0.0))
train_cfg = dict(max_epochs=1)
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
default_hooks = dict(logger=dict(interval=1))
"""


def launch(tool, *arguments, cwd):
    """Run a shell tool, on CPU and on a port of its own."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    environ = {
        'CUDA_VISIBLE_DEVICES': '-1',
        'OMP_NUM_THREADS': '1',
        # The tools take the python they find, which is to be this one.
        'PATH': os.pathsep.join(
            [os.path.dirname(sys.executable), os.environ['PATH']]
        ),
        'PORT': str(port),
        'PYTHONPATH': os.pathsep.join([str(ROOT / 'tests'), str(ROOT)]),
    }
    run = subprocess.run(
        ['bash', str(ROOT / 'tools' / tool), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'two_ranks.py'
    base = ROOT / 'configs' / 'actnn' / 'retinanet_r18_digits.py'
    path.write_text(CONFIG.format(base=str(base)))
    return path


def train(config, home, *options):
    """Train with two processes; return the log and what each ended with."""
    work_dir = config.parent / 'work_dir'
    arguments = [config, 2, '--work-dir', work_dir, *options]
    log = launch('dist_train.sh', *arguments, cwd=home)
    states = [torch.load(work_dir / f'rank{rank}.pth') for rank in (0, 1)]
    assert states[0]['losses'] != states[1]['losses'], 'same data on both'
    return log, [state['model'] for state in states]


def differing(one, other):
    return [key for key in one if not torch.equal(one[key], other[key])]


def test_both_ranks_end_with_equal_weights(config, digits_home):
    log, (first, second) = train(config, digits_home)
    assert 'communicate through gloo, not through nccl' in log
    assert 'coco/bbox_mAP' in log
    # Without SyncBN each process keeps running statistics of its own.
    assert all('running_' in key for key in differing(first, second))

    checkpoint = config.parent / 'work_dir' / 'epoch_1.pth'
    out = config.parent / 'predictions.pkl'
    log = launch(
        *('dist_test.sh', config, checkpoint, 2, '--out', out),
        cwd=digits_home,
    )
    assert 'coco/bbox_mAP' in log
    assert out.stat().st_size > 0


def test_sync_bn_keeps_the_statistics_equal_too(config, digits_home):
    _, (first, second) = train(
        config, digits_home, '--cfg-options', 'sync_bn=torch'
    )
    assert differing(first, second) == []
