# mmseg's official UPerNet R50 80k recipe on Cityscapes, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/upernet_r50.py 4
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/actnn.py',
]

# ResNet has no `act_cfg`; the hook converts its ReLUs and max pooling, the
# head's average pooling and the convolutions that classify.
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
    auxiliary_head=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.sync_norm_cfg,
        act_cfg=_base_.actnn.act_cfg,
    ),
)
