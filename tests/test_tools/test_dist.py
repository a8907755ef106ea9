"""Tests of tools/dist_train.sh and tools/dist_test.sh, without a GPU."""

import pytest
import torch
from mmengine.config import Config
from support.tools import ROOT, run_tool
from support.toy import make_config

DETECTOR = """
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

# The stock model, which has SyncBN, in small.
SEGMENTOR = """
_base_ = [
    'mmseg::_base_/models/fcn_r50-d8.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmactnn', 'support.rank_state'])
custom_hooks = [
    dict(type='ActNNHook', level='L3'),
    dict(type='RankStateHook'),
]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    pretrained=None,
    backbone=dict(depth=18, base_channels=8, stem_channels=8),
    decode_head=dict(in_channels=64, channels=16, num_classes=11),
    auxiliary_head=dict(in_channels=32, channels=8, num_classes=11),
)
dataset = dict(
    type='BaseSegDataset',
    data_root='data/digits',
    metainfo=dict(
        classes=['ground', *'0123456789'], palette=[[i] * 3 for i in range(11)]
    ),
    seg_map_suffix='.png',
    img_suffix='.png',
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ],
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='train', seg_map_path='seg/train'), **dataset
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='val', seg_map_path='seg/val'), **dataset
    ),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
"""


@pytest.fixture
def write(tmp_path):
    """Write a config file and return its path."""

    def write(text):
        path = tmp_path / 'config.py'
        path.write_text(text)
        return path

    return write


@pytest.fixture
def detector(write):
    base = ROOT / 'configs' / 'actnn' / 'retinanet_r18_digits.py'
    return write(DETECTOR.format(base=str(base)))


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


def train(config, ranks, *options, cwd, nodes=1):
    """Train; return the log and what each process ended with."""
    work_dir = config.parent / 'work_dir'
    arguments = [config, ranks, '--work-dir', work_dir, *options]
    log = run_tool('dist_train.sh', *arguments, cwd=cwd, nodes=nodes)
    return log, load_states(work_dir, nodes * ranks)


def load_states(work_dir, ranks):
    """What the processes ended with, which they have just written."""
    states = []
    for rank in range(ranks):
        file = work_dir / f'rank{rank}.pth'
        states.append(torch.load(file))
        file.unlink()
    assert not list(work_dir.glob('rank*.pth')), 'more processes than asked'
    losses = {tuple(state['losses']) for state in states}
    assert len(losses) == ranks, 'the same data on several'
    return states


def differing(states):
    """Names of what is not equal in all states of a model."""
    one, *others = (state['model'] for state in states)
    return {
        key
        for other in others
        for key in one
        if not torch.equal(one[key], other[key])
    }


def assert_equal_bits(states):
    for state in states[1:]:
        torch.testing.assert_close(
            state['precision'], states[0]['precision'], rtol=0, atol=0
        )


def test_both_ranks_end_with_equal_weights(detector, digits_home):
    log, states = train(detector, 2, cwd=digits_home)
    assert 'communicate through gloo, not through nccl' in log
    assert 'coco/bbox_mAP' in log
    # Without SyncBN each process keeps running statistics of its own.
    assert all('running_' in key for key in differing(states))
    assert_equal_bits(states)

    checkpoint = detector.parent / 'work_dir' / 'epoch_1.pth'
    out = detector.parent / 'predictions.pkl'
    log = run_tool(
        *('dist_test.sh', detector, checkpoint, 2, '--out', out),
        cwd=digits_home,
    )
    assert 'coco/bbox_mAP' in log
    assert out.stat().st_size > 0


def test_sync_bn_keeps_the_statistics_equal_too(tmp_path):
    config = write_toy(tmp_path / 'toy.py', dict(type='ActNNHook'))
    _, states = train(
        config, 2, '--cfg-options', 'sync_bn=torch', cwd=tmp_path
    )
    assert differing(states) == set()


def test_segmentor_with_sync_bn(write, digits_home):
    log, states = train(write(SEGMENTOR), 2, cwd=digits_home)
    assert 'SyncBatchNorm -> QSyncBatchNorm' in log
    assert 'mIoU' in log
    assert differing(states) == set()
    assert_equal_bits(states)


def test_two_nodes(tmp_path):
    config = write_toy(
        tmp_path / 'toy.py', dict(type='ActNNHook'), evaluates=True
    )
    _, states = train(config, 1, cwd=tmp_path, nodes=2)
    assert all('running_' in key for key in differing(states))
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
    for epoch, ranks in enumerate((1, 4), start=2):
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
