# mmpretrain's official Swin-T recipe on ImageNet-1k, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/swin_t_in1k.py 16
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    '../_base_/actnn.py',
]

# The hook converts all of it; no option has to name a layer.
