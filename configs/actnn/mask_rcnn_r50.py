# mmdet's official Mask R-CNN R50-FPN 1x recipe on COCO, with compressed
# activations and nothing else changed.
#
#   python tools/train.py configs/actnn/mask_rcnn_r50.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/actnn.py',
]

# QFPN and QRPNHead call layers where their parents call functions. The hook
# converts what no option reaches, such as the mask head's deconvolution,
# whose type has to be 'deconv'.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg
    ),
    neck=dict(type='QFPN', conv_cfg=_base_.actnn.conv_cfg),
    rpn_head=dict(type='QRPNHead'),
    roi_head=dict(mask_head=dict(conv_cfg=_base_.actnn.conv_cfg)),
)
