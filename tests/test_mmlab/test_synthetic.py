"""Models of configs, and synthetic data for them."""

import pytest
import torch
from mmengine.config import Config
from support.torchvision_stub import need_mmpretrain

from mmactnn.mmlab import ground_truth, synthetic

RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'


def images(count=1):
    return torch.randn(count, 3, 48, 96)


@pytest.mark.parametrize(
    'name', ['mmdet::none.py', 'no_such_package::x.py', 'no/such/file.py']
)
def test_rejects_configs(name):
    with pytest.raises(ValueError, match='is no file|is not installed'):
        synthetic.load_config(name)


def test_rejects_other_packages(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmpose'\nmodel = dict(type='X')\n")
    with pytest.raises(ValueError, match="mmpretrain, got 'mmpose' in"):
        synthetic.load_config(str(config))


def test_overrides():
    config = synthetic.load_config(RETINANET, ['model.backbone.depth=18'])
    assert config.model.backbone.depth == 18
    assert config.default_scope == 'mmdet'


def test_pretrained_weights_are_dropped():
    config = synthetic.load_config(RETINANET).model
    assert config.backbone.init_cfg.type == 'Pretrained'
    synthetic.drop_pretrained(config)
    assert config.backbone.init_cfg is None


def test_detection_samples():
    config = synthetic.load_config(
        'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    )
    first, second = ground_truth.make_samples(config, images(2))
    boxes = first.gt_instances.bboxes
    assert boxes.min() >= 0 and (boxes <= torch.tensor([96, 48] * 2)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert first.gt_instances.labels.max() < 80
    assert first.gt_instances.masks.masks.shape == (8, 48, 96)
    assert not torch.equal(boxes, second.gt_instances.bboxes)


def test_panoptic_samples():
    config = synthetic.load_config(
        'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'
    )
    (sample,) = ground_truth.make_samples(config, images())
    assert sample.gt_sem_seg.sem_seg.shape == (1, 48, 96)


def test_segmentation_samples():
    config = synthetic.load_config(
        'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    )
    (sample,) = ground_truth.make_samples(config, images())
    assert sample.gt_sem_seg.data.shape == (1, 48, 96)
    assert sample.gt_sem_seg.data.max() < 19


@pytest.mark.parametrize(
    'num_views, expected', [(2, 2), ([2], 2), ([2, 6], 8)]
)
def test_views(num_views, expected):
    pipeline = [dict(type='MultiView', num_views=num_views, transforms=[])]
    config = Config(
        dict(train_dataloader=dict(dataset=dict(pipeline=pipeline)))
    )
    assert ground_truth.count_views(config) == expected


def test_no_views():
    assert ground_truth.count_views(Config(dict())) == 0
    assert ground_truth.count_views(synthetic.load_config(RETINANET)) == 0


@pytest.mark.parametrize(
    'name, options',
    [
        ('mocov2/mocov2_resnet50_8xb32-coslr-200e', ['model.queue_len=64']),
        ('byol/byol_resnet50_16xb256-coslr-200e', []),
        ('simclr/simclr_resnet50_8xb32-coslr-200e', []),
    ],
)
def test_self_supervised_models(name, options):
    need_mmpretrain()
    config = synthetic.load_config(
        f'mmpretrain::{name}_in1k.py',
        ['model.backbone.depth=18', 'model.neck.in_channels=512', *options],
    )
    _, compute_loss = synthetic.build_task(config, torch.randn(2, 3, 64, 64))
    for _ in range(2):
        loss = compute_loss()
        assert loss.isfinite() and loss.requires_grad
