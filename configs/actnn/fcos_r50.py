# mmdet's official FCOS R50-FPN 1x recipe on COCO, with group normalization in
# the head, with compressed activations and nothing else changed.
#
#   python tools/train.py configs/actnn/fcos_r50.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    '../_base_/actnn.py',
]

# Only the type of norm_cfg, as the backbone's norms are frozen. QFPN calls
# a layer where its parent calls F.relu.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=dict(type=_base_.actnn.norm_cfg.type),
    ),
    neck=dict(type='QFPN', conv_cfg=_base_.actnn.conv_cfg),
    bbox_head=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=dict(type='QGN', num_groups=32, requires_grad=True),
    ),
)
