# mmpretrain's ResNet-18 recipe on CIFAR-10 with compressed activations, in 20
# epochs instead of 200, its steps in proportion. The total batch of 128 is on
# one GPU, where the training from scratch takes minutes.
#
#   python tools/dataset_converters/cifar10.py cifar-10-batches-py data/cifar10
#   python tools/train.py configs/actnn/resnet18_cifar10.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::resnet/resnet18_8xb16_cifar10.py',
    '../_base_/actnn.py',
]

# The hook converts what ResNet has no option for, and the linear layer.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg
    ),
)

# The converter's files hold the images. The stock class of the data set would
# read published files only, by their checksums.
train_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    dataset=dict(
        _delete_=True,
        type='BaseDataset',
        data_root='data/cifar10/',
        ann_file='train.pkl',
        data_prefix=dict(),
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=500,
    persistent_workers=True,
    dataset=dict(
        _delete_=True,
        type='BaseDataset',
        data_root='data/cifar10/',
        ann_file='test.pkl',
        data_prefix=dict(),
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=20)
param_scheduler = dict(milestones=[10, 15])

# Of two checkpoints one is complete at any time.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
