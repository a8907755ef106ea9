# mmseg's official Mask2Former R50 recipe on ADE20K, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/mask2former_r50_ade20k.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'

# MMDetection has the head. The recipe imports it, hence not
# `../_base_/actnn.py` but this.
custom_imports = dict(
    imports=['mmactnn', 'mmdet.models'], allow_failed_imports=False
)
custom_hooks = [dict(type='ActNNHook', level='L3')]

# Only the type of norm_cfg, as the backbone's norms are frozen. The hook
# converts the pixel decoder and the transformer.
model = dict(
    backbone=dict(
        conv_cfg=dict(type='QConv2d'), norm_cfg=dict(type='QSyncBN')
    ),
)
