# mmpretrain's official MobileNetV3-large recipe on ImageNet-1k, with
# compressed activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/mobilenet_v3_in1k.py 8
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::mobilenet_v3/mobilenet-v3-large_8xb128_in1k.py',
    '../_base_/actnn.py',
]

# The hook converts all of it; no option has to name a layer.
