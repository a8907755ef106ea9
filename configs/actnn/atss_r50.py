# mmdet's official ATSS R50-FPN 1x recipe on COCO, with compressed activations
# and nothing else changed.
#
#   python tools/train.py configs/actnn/atss_r50.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    '../_base_/actnn.py',
]

model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg
    ),
    neck=dict(conv_cfg=_base_.actnn.conv_cfg),
    bbox_head=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=dict(type='QGN', num_groups=32, requires_grad=True),
    ),
)
