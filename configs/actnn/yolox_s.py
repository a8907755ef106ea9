# mmdet's official YOLOX-s recipe on COCO, with compressed activations and
# nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/yolox_s.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
custom_imports = dict(imports=['mmactnn'], allow_failed_imports=False)

# Only the type of norm_cfg, as this recipe has a momentum of its own. The
# hook converts Swish.
model = dict(
    backbone=dict(
        conv_cfg=dict(type='QConv2d'),
        norm_cfg=dict(type='QBN2d'),
    ),
    neck=dict(
        conv_cfg=dict(type='QConv2d'),
        norm_cfg=dict(type='QBN2d'),
    ),
    bbox_head=dict(
        conv_cfg=dict(type='QConv2d'),
        norm_cfg=dict(type='QBN2d'),
    ),
)

# The recipe has hooks of its own, which a list would replace: not
# `../_base_/actnn.py` but this.
custom_hooks = [dict(type='ActNNHook', level='L3'), *_base_.custom_hooks]
