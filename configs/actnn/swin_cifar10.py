# A small Swin Transformer from scratch on CIFAR-10, with compressed
# activations: minutes on one GPU.
#
#   python tools/dataset_converters/cifar10.py cifar-10-batches-py data/cifar10
#   python tools/train.py configs/actnn/swin_cifar10.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/adamw_15e.py',
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/actnn.py',
]

# The hook converts all of it; no option has to name a layer. Feature maps
# have 16x16, 8x8 and 4x4 places.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=48, depths=[2, 2, 4], num_heads=[2, 4, 8]),
        img_size=32,
        patch_size=2,
        window_size=4,
        drop_path_rate=0.1,
        out_indices=(2,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=192,
        init_cfg=None,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    init_cfg=[
        dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
        dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
    ],
)

# Of two checkpoints one is complete at any time.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
