# mmpretrain's official ViT-B/16 recipe on ImageNet-1k, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/vit_b_in1k.py 64
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py',
    '../_base_/actnn.py',
]

# The hook converts all of it; no option has to name a layer.
