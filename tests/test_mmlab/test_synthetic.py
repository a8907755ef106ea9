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


def build_narrow(name, *options):
    """A detector of few channels, and its loss."""
    channels = [16, 32, 64, 128]
    narrow = [
        'model.backbone.depth=18',
        'model.backbone.base_channels=16',
        'model.backbone.stem_channels=16',
        f'model.neck.in_channels={channels}'.replace(' ', ''),
        *options,
    ]
    torch.manual_seed(0)
    config = synthetic.load_config(f'mmdet::{name}', narrow)
    return synthetic.build_task(config, torch.randn(2, 3, 64, 96))


def assert_trains(compute_loss):
    # Twice, as some models change their ground truth.
    for _ in range(2):
        loss = compute_loss()
        assert loss.isfinite() and loss.requires_grad


def test_proposals():
    _, compute_loss = build_narrow(
        'fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py',
        'model.roi_head.bbox_head.fc_out_channels=32',
    )
    assert_trains(compute_loss)


def test_no_classes():
    _, compute_loss = build_narrow('rpn/rpn_r50_fpn_1x_coco.py')
    assert_trains(compute_loss)


def test_epoch():
    model, compute_loss = build_narrow('tood/tood_r50_fpn_1x_coco.py')
    assert_trains(compute_loss)
    assert model.bbox_head.epoch == 0


def test_ground_truth_of_a_preprocessor():
    config = synthetic.load_config(
        'mmdet::boxinst/boxinst_r50_fpn_ms-90k_coco.py'
    )
    (sample,) = ground_truth.make_samples(config, images())
    assert 'masks' not in sample.gt_instances
    _, compute_loss = build_narrow(
        'boxinst/boxinst_r50_fpn_ms-90k_coco.py', 'model.neck.num_outs=5'
    )
    assert_trains(compute_loss)


def test_teacher_without_its_checkpoint():
    name = 'mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py'
    config = synthetic.load_config(name)
    teacher = config.model.teacher_config.model
    assert teacher.backbone.depth == 101
    assert config.model.teacher_ckpt
    synthetic.drop_pretrained(config.model)
    assert config.model.teacher_ckpt is None
    assert teacher.backbone.init_cfg is None


def test_branches_of_unlabelled_images():
    config = synthetic.load_config(
        'mmdet::soft_teacher/'
        'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'
    )
    branches = ground_truth.list_branches(config)
    assert branches == ['sup', 'unsup_teacher', 'unsup_student']
    samples = ground_truth.make_samples(config, images())
    (empty,) = ground_truth.make_empty_samples(samples)
    assert len(empty.gt_instances) == 0 < len(samples[0].gt_instances)
    assert empty.homography_matrix.shape == (3, 3)


@pytest.mark.parametrize(
    'name, expected',
    [
        ('mmdet::ssd/ssd300_coco.py', (300, 300)),
        ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', (800, 1333)),
        ('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py', (512, 1024)),
    ],
)
def test_training_shape(name, expected):
    config = synthetic.load_config(name)
    assert synthetic.training_shape(config) == expected


def test_no_training_shape():
    assert synthetic.training_shape(Config(dict())) is None


def test_masks_that_only_the_pipeline_names():
    config = synthetic.load_config('mmdet::solo/solo_r50_fpn_1x_coco.py')
    assert not config.model.get('pad_mask')
    config.model.data_preprocessor.pad_mask = False
    (sample,) = ground_truth.make_samples(config, images())
    assert sample.gt_instances.masks.masks.shape == (8, 48, 96)


def test_edges():
    config = synthetic.load_config(
        'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'
    )
    (sample,) = ground_truth.make_samples(config, images())
    assert set(sample.gt_edge_map.data.unique().tolist()) == {0, 1}
