# mmdet's official RetinaNet R50-FPN 1x recipe on COCO, with compressed
# activations and nothing else changed.
#
#   python tools/train.py configs/actnn/retinanet_r50.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    '../_base_/actnn.py',
]

# ResNet has no `act_cfg` and RetinaHead passes none on; the hook converts
# their ReLUs and the two output convolutions of the head.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg
    ),
    neck=dict(conv_cfg=_base_.actnn.conv_cfg),
    bbox_head=dict(conv_cfg=_base_.actnn.conv_cfg),
)
