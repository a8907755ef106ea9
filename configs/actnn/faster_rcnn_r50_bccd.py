# Faster R-CNN R50-FPN on BCCD (microscope images of blood cells, 3 classes),
# trained from scratch within minutes on one GPU.
#
#   python tools/dataset_converters/bccd.py BCCD_Dataset/BCCD data/bccd
#   python tools/train.py configs/actnn/faster_rcnn_r50_bccd.py
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
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/bccd_40e.py',
    '../_base_/actnn.py',
]

# From scratch no stage can be frozen, and a short schedule only converges with
# normalization in neck and box head, too. The box head has group
# normalization, since samples in training, a quarter of them cells, have other
# statistics than proposals in tests.
model = dict(
    backbone=dict(
        frozen_stages=-1,
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(
        type='QFPN',
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
    ),
    rpn_head=dict(type='QRPNHead'),
    roi_head=dict(
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            num_classes=3,
            conv_cfg=_base_.actnn.conv_cfg,
            norm_cfg=dict(type='QGN', num_groups=32, requires_grad=True),
        )
    ),
)
