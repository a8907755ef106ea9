"""Tests of tools/dist_train.sh and tools/dist_test.sh with whole models."""

import pytest
from support.dist_train import assert_equal_bits, differing, train
from support.tools import ROOT, run_tool

# test_dist.py does as much with a small model; test_layers/test_sync_norm.py
# and test_integration/test_distributed.py compare with one process.
pytestmark = pytest.mark.full

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


def test_segmentor_with_sync_bn(write, digits_home):
    log, states = train(write(SEGMENTOR), 2, cwd=digits_home)
    assert 'SyncBatchNorm -> QSyncBatchNorm' in log
    assert 'mIoU' in log
    assert differing(states) == set()
    assert_equal_bits(states)
