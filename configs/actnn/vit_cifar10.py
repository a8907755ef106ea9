# A small ViT from scratch on CIFAR-10, with compressed activations: minutes
# on one GPU.
#
#   python tools/dataset_converters/cifar10.py cifar-10-batches-py data/cifar10
#   python tools/train.py configs/actnn/vit_cifar10.py
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

# The hook converts all of it; no option has to name a layer.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=192,
            num_layers=6,
            num_heads=3,
            feedforward_channels=768,
        ),
        img_size=32,
        patch_size=4,
        drop_path_rate=0.1,
    ),
    neck=None,
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=10,
        in_channels=192,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)

# Of two checkpoints one is complete at any time.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
