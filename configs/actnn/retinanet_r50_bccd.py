# RetinaNet R50-FPN on BCCD (microscope images of blood cells, 3 classes),
# trained from scratch within minutes on one GPU.
#
#   python tools/dataset_converters/bccd.py BCCD_Dataset/BCCD data/bccd
#   python tools/train.py configs/actnn/retinanet_r50_bccd.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
#
# To start from ImageNet weights instead, add to the same option (`_delete_`
# because there is no dict to merge into):
#
#   model.backbone.init_cfg._delete_=True
#   model.backbone.init_cfg.type=Pretrained
#   model.backbone.init_cfg.checkpoint=torchvision://resnet50
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/actnn.py',
]

# From scratch nothing can be frozen, and normalization in neck and head as
# well is what makes a short schedule converge.
model = dict(
    backbone=dict(
        frozen_stages=-1,
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg),
    bbox_head=dict(
        num_classes=3,
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
    ),
)

max_epochs = 40
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=10
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]

default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=10, max_keep_ckpts=1)
)
randomness = dict(seed=0)
