# RetinaNet R50-FPN on BCCD (microscope images of blood cells, 3 classes),
# trained from scratch within minutes on one GPU.
#
#   python tools/dataset_converters/bccd.py BCCD_Dataset/BCCD data/bccd
#   python tools/train.py configs/actnn/retinanet_r50_bccd.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
#
# To start from ImageNet weights instead, add to the same option (`_delete_`
# because there is no dict to merge into):
#
#   model.backbone.init_cfg._delete_=True
#   model.backbone.init_cfg.type=Pretrained
#   model.backbone.init_cfg.checkpoint=torchvision://resnet50
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/bccd_40e.py',
    '../_base_/actnn.py',
]

# From scratch nothing can be frozen, and normalization in neck and head as
# well is what makes a short schedule converge.
model = dict(
    backbone=dict(
        frozen_stages=-1,
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(conv_cfg=_base_.actnn.conv_cfg, norm_cfg=_base_.actnn.norm_cfg),
    bbox_head=dict(
        num_classes=3,
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
    ),
)
