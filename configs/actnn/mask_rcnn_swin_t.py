# mmdet's official Mask R-CNN Swin-T 1x recipe on COCO, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/mask_rcnn_swin_t.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    '../_base_/actnn.py',
]

# The hook converts what no option reaches, such as the whole backbone.
model = dict(
    neck=dict(type='QFPN', conv_cfg=_base_.actnn.conv_cfg),
    rpn_head=dict(type='QRPNHead'),
    roi_head=dict(mask_head=dict(conv_cfg=_base_.actnn.conv_cfg)),
)
