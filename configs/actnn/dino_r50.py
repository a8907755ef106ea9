# mmdet's official DINO R50 recipe of 12 epochs on COCO, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/dino_r50.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/actnn.py',
]

# Only the type of norm_cfg, as the backbone's norms are frozen. The hook
# converts the transformer.
model = dict(
    backbone=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=dict(type=_base_.actnn.norm_cfg.type),
    ),
    neck=dict(conv_cfg=_base_.actnn.conv_cfg),
)
