# mmpretrain's official SimCLR ResNet-50 recipe on ImageNet-1k, with
# compressed activations and nothing else changed.
#
#   GPUS=16 bash tools/slurm_train.sh PARTITION simclr \
#       configs/actnn/simclr_r50.py work_dirs/simclr_r50
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::simclr/simclr_resnet50_16xb256-coslr-200e_in1k.py',
    '../_base_/actnn.py',
]

# The hook converts the linear layers of the neck.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.sync_norm_cfg,
    ),
    neck=dict(norm_cfg=_base_.actnn.sync_norm_cfg),
)

# As inherited, with the toolbox's scope noted in it, the runner would hand the
# scope to the function.
train_dataloader = dict(collate_fn=dict(_delete_=True, type='default_collate'))
