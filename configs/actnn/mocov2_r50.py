# mmpretrain's official MoCo v2 ResNet-50 recipe on ImageNet-1k, with
# compressed activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/mocov2_r50.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k.py',
    '../_base_/actnn.py',
]

# The hook converts the neck. The momentum encoder, which has no gradient,
# keeps nothing.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg
    ),
)

# As inherited, with the toolbox's scope noted in it, the runner would hand the
# scope to the function.
train_dataloader = dict(collate_fn=dict(_delete_=True, type='default_collate'))
