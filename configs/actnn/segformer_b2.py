# mmseg's official SegFormer-B2 recipe on ADE20K, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/segformer_b2.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmseg::segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py',
    '../_base_/actnn.py',
]

# The hook converts the backbone.
model = dict(
    decode_head=dict(
        conv_cfg=_base_.actnn.conv_cfg,
        norm_cfg=_base_.actnn.sync_norm_cfg,
        act_cfg=_base_.actnn.act_cfg,
    ),
)
