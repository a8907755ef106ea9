# The layer types of mmactnn, without the hook: for recipes whose base has
# `custom_hooks` of its own, which two bases must not share.
#
#   _base_ = ['mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
#             '../_base_/actnn_layers.py']
#   custom_hooks = [dict(type='ActNNHook', level='L3'), *_base_.custom_hooks]
custom_imports = dict(imports=['mmactnn'], allow_failed_imports=False)

# Under a name of their own: many bases have a `norm_cfg`, and two bases must
# not share a key.
actnn = dict(
    conv_cfg=dict(type='QConv2d'),
    norm_cfg=dict(type='QBN2d', requires_grad=True),
    act_cfg=dict(type='QReLU'),
)
