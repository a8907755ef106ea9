# mmpretrain's official ConvNeXt-T recipe on ImageNet-1k, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/convnext_t_in1k.py 32
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py'
custom_imports = dict(imports=['mmactnn'], allow_failed_imports=False)

# The hook converts all of it. The recipe has a hook of its own, which a list
# would replace: not `../_base_/actnn.py` but this.
custom_hooks = [dict(type='ActNNHook', level='L3'), *_base_.custom_hooks]
