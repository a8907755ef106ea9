# mmpretrain's official ResNet-50 recipe on CIFAR-10, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/resnet50_cifar10.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::resnet/resnet50_8xb16_cifar10.py',
    '../_base_/actnn.py',
]

# The hook converts what ResNet has no option for, and the linear layer.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg
    ),
)
