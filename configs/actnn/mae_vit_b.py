# mmpretrain's official MAE ViT-B recipe on ImageNet-1k, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/mae_vit_b.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py',
    '../_base_/actnn.py',
]

# The hook converts all of it; no option has to name a layer.
