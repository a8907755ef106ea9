# Enables the activation compression of mmactnn. Mix it into any config and
# pass the layer types to options of the model:
#
#   _base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
#             '../_base_/actnn.py']
#   model = dict(backbone=dict(conv_cfg=_base_.actnn.conv_cfg,
#                              norm_cfg=_base_.actnn.norm_cfg))
#
# The hook converts the layers that no option reaches, so a model is
# compressed in full even where only the hook is mixed in. A config with
# `custom_hooks` of its own has to list ActNNHook there, because a list
# replaces the list it inherits.
custom_imports = dict(imports=['mmactnn'], allow_failed_imports=False)

# Under a name of their own: many bases have a `norm_cfg`, and two bases must
# not share a key.
actnn = dict(
    conv_cfg=dict(type='QConv2d'),
    norm_cfg=dict(type='QBN2d', requires_grad=True),
    sync_norm_cfg=dict(type='QSyncBN', requires_grad=True),
    act_cfg=dict(type='QReLU'),
)

custom_hooks = [dict(type='ActNNHook', level='L3')]
