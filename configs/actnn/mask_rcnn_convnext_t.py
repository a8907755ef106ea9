# mmdet's official Mask R-CNN ConvNeXt-T 3x recipe on COCO, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/mask_rcnn_convnext_t.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = (
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
)

# MMPretrain has the backbone. The recipe imports it, hence not
# `../_base_/actnn.py` but this.
custom_imports = dict(
    imports=['mmactnn', 'mmpretrain.models'], allow_failed_imports=False
)
custom_hooks = [dict(type='ActNNHook', level='L3')]

# The hook converts what no option reaches, such as the whole backbone.
model = dict(
    neck=dict(type='QFPN', conv_cfg=dict(type='QConv2d')),
    rpn_head=dict(type='QRPNHead'),
    roi_head=dict(mask_head=dict(conv_cfg=dict(type='QConv2d'))),
)
