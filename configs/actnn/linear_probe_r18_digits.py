# Linear probe of the backbone of mocov2_r18_digits.py: top-1 accuracy of a
# linear classifier on its frozen features.
#
#   python tools/train.py configs/actnn/linear_probe_r18_digits.py
#
# For another checkpoint, such as the exact twin's:
#
#   --cfg-options model.backbone.init_cfg.checkpoint=CHECKPOINT
_base_ = [
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/datasets/digits_classification.py',
    '../_base_/actnn.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR',
        depth=18,
        base_channels=32,
        stem_channels=32,
        frozen_stages=4,
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mocov2_r18_digits/epoch_200.pth',
            prefix='backbone.',
        ),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=256,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)

max_epochs = 30
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=10
)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=3.0, momentum=0.9, weight_decay=0.0),
)
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=max_epochs,
    by_epoch=True,
    begin=0,
    end=max_epochs,
    convert_to_iter_based=True,
)

default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=10, max_keep_ckpts=2)
)
randomness = dict(seed=0)
