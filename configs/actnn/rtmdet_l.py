# mmdet's official RTMDet-l recipe on COCO, with compressed activations and
# nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/rtmdet_l.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = 'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py'
custom_imports = dict(imports=['mmactnn'], allow_failed_imports=False)

# The hook converts what no option reaches: parts of CSPNeXt's blocks, the
# channel attention and the output convolutions.
model = dict(
    backbone=dict(
        conv_cfg=dict(type='QConv2d'),
        norm_cfg=dict(type='QSyncBN'),
        act_cfg=dict(type='QSiLU'),
    ),
    neck=dict(
        conv_cfg=dict(type='QConv2d'),
        norm_cfg=dict(type='QSyncBN'),
        act_cfg=dict(type='QSiLU'),
    ),
    bbox_head=dict(
        conv_cfg=dict(type='QConv2d'),
        norm_cfg=dict(type='QSyncBN'),
        act_cfg=dict(type='QSiLU'),
    ),
)

# The recipe has hooks of its own, which a list would replace: not
# `../_base_/actnn.py` but this.
custom_hooks = [dict(type='ActNNHook', level='L3'), *_base_.custom_hooks]
