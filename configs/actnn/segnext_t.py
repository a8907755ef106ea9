# mmseg's official SegNeXt-T recipe on ADE20K, with compressed
# activations and nothing else changed.
#
#   bash tools/dist_train.sh configs/actnn/segnext_t.py 1
#
# Its exact twin, the same run without compression, is one override away:
#
#   --cfg-options custom_hooks.0.level=L0
_base_ = [
    'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py',
    '../_base_/actnn.py',
]

# The hook converts all of it; no option has to name a layer.
