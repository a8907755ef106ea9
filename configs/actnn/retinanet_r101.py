# mmdet's official RetinaNet R101-FPN 1x recipe on COCO, with compressed
# activations and nothing else changed.
#
#   python tools/train.py configs/actnn/retinanet_r101.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py',
    '../_base_/actnn.py',
]

model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg
    ),
    neck=dict(conv_cfg=_base_.actnn.conv_cfg),
    bbox_head=dict(conv_cfg=_base_.actnn.conv_cfg),
)
