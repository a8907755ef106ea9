# mmpretrain's official EfficientNet-B0 recipe on ImageNet-1k, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/efficientnet_b0_in1k.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py',
    '../_base_/actnn.py',
]

# The hook converts all of it; no option has to name a layer.
