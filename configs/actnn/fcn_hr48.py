# mmseg's official HRNet-W48 recipe with an FCN head, 80k on Cityscapes, with
# compressed activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/fcn_hr48.py 4
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmseg::hrnet/fcn_hr48_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/actnn.py',
]

# HRNet has no `act_cfg`; the hook converts its ReLUs and the convolution that
# classifies.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.sync_norm_cfg,
    ),
    decode_head=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.sync_norm_cfg,
        act_cfg=_base_.actnn.act_cfg,
    ),
)
