# mmseg's official DeepLabV3+ R50-D8 80k recipe on Cityscapes, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/deeplabv3plus_r50.py 4
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmseg::deeplabv3plus/'
    'deeplabv3plus_r50-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/actnn.py',
]

# ResNet has no `act_cfg`, and the head's depthwise separable convolutions are
# built without `conv_cfg`; the hook converts them, and all pooling.
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
