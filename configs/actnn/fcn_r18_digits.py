# FCN with a half-width ResNet-18 that segments handwritten digits: trains from
# scratch within minutes on one GPU.
#
#   python tools/dataset_converters/digits.py data/digits
#   python tools/train.py configs/actnn/fcn_r18_digits.py
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmseg::_base_/models/fcn_r50-d8.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/datasets/digits_segmentation.py',
    '../_base_/schedules/digits_segmentation.py',
    '../_base_/actnn.py',
]

model = dict(
    data_preprocessor=dict(size_divisor=32),
    pretrained=None,
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
    ),
    decode_head=dict(
        in_channels=256,
        channels=64,
        num_classes=11,
        loss_decode=dict(class_weight=_base_.class_weight),
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
        act_cfg=_base_.actnn.act_cfg,
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=64,
        num_classes=11,
        loss_decode=dict(class_weight=_base_.class_weight),
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.norm_cfg,
        act_cfg=_base_.actnn.act_cfg,
    ),
)
