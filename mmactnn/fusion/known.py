"""The classes whose forward pass is known, and what computes it instead."""

from torch import nn

from .base import Fusion
from .blocks import FusedConvModule, FusedPairs, FusedResidual, Pair
from .heads import FusedMaskHead, make_dense_head
from .necks import FusedFPN
from .stages import FusedStage


def make_fusion(module):
    """What can compute a module's forward pass in its place.

    Args:
        module (nn.Module): The module.

    Returns:
        Fusion, optional: Not installed; None if there is nothing.
    """
    make = _MAKERS.get(_forward_of(module))
    return None if make is None else make(module)


def is_fused(module):
    """Whether the forward pass of a module is computed in its place.

    Args:
        module (nn.Module): The module.
    """
    return isinstance(vars(module).get('forward'), Fusion)


def _forward_of(module):
    """Full name of the class that a module has its forward pass from.

    None if somebody else has put something in its place, as MMEngine does
    for activation checkpointing.
    """
    if 'forward' in vars(module) and not is_fused(module):
        return None
    for cls in type(module).__mro__:
        if 'forward' in vars(cls):
            return f'{cls.__module__}.{cls.__qualname__}'
    return None


def _sequential(module):
    blocks = [make_fusion(child) for child in module.children()]
    if blocks and all(isinstance(block, FusedResidual) for block in blocks):
        return FusedStage(module, blocks)
    names = list(module._modules)
    return FusedPairs(module, map(Pair, [None, *names], names, names[1:]))


def _conv_module(module):
    order = [
        layer for layer in module.order if layer != 'norm' or module.with_norm
    ]
    if not module.with_activation or order[-1] != 'act':
        return None
    if order[0] == 'conv' and not module.with_explicit_padding:
        return FusedConvModule(module)
    if order[-2] == 'norm':
        conv = 'conv' if order[0] == 'conv' else None
        return FusedPairs(module, [Pair(conv, module.norm_name, 'activate')])
    return None


def _torchvision_block(depth):
    def make(module):
        numbers = range(1, depth + 1)
        convs = [f'conv{i}' for i in numbers]
        return FusedResidual(module, convs, [f'bn{i}' for i in numbers])

    return make


def _openmmlab_block(depth):
    def make(module):
        numbers = range(1, depth + 1)
        convs = [f'conv{i}' for i in numbers]
        norms = [getattr(module, f'norm{i}_name') for i in numbers]
        if module.with_cp:
            # The second forward pass starts in the middle of the module.
            return None
        plain = not getattr(module, 'with_plugins', False) and isinstance(
            getattr(module, 'drop_path', nn.Identity()), nn.Identity
        )
        if not plain:
            # Plugins may read a convolution's output, too.
            pairs = [Pair(None, norm, 'relu') for norm in norms[:-1]]
            return FusedPairs(module, pairs)
        return FusedResidual(module, convs, norms)

    return make


def _openmmlab_stem(module):
    if module.deep_stem:  # an nn.Sequential
        return None
    return FusedPairs(module, [Pair('conv1', module.norm1_name, 'relu')])


def _hrnet_stem(module):
    pairs = (
        Pair('conv1', module.norm1_name, 'relu'),
        Pair('conv2', module.norm2_name, 'relu'),
    )
    return FusedPairs(module, pairs)


def _non_linear_neck(module):
    # ReLU comes before each linear layer but the first.
    norms = ['bn0', *module.bn_names][: len(module.fc_names)]
    return FusedPairs(module, [Pair(None, norm, 'relu') for norm in norms])


def _dense_layer(module):
    if module.memory_efficient:
        return None
    pairs = [Pair(None, 'norm1', 'relu1'), Pair('conv1', 'norm2', 'relu2')]
    return FusedPairs(module, pairs)


# By the class that defines `forward`: subclasses that do not are known, too.
_MAKERS = {
    'torch.nn.modules.container.Sequential': _sequential,
    'torchvision.models.resnet.BasicBlock': _torchvision_block(2),
    'torchvision.models.resnet.Bottleneck': _torchvision_block(3),
    'torchvision.models.resnet.ResNet': lambda module: FusedPairs(
        module, [Pair('conv1', 'bn1', 'relu')]
    ),
    'torchvision.models.densenet._DenseLayer': _dense_layer,
    'mmcv.cnn.bricks.conv_module.ConvModule': _conv_module,
    'mmdet.models.dense_heads.anchor_head.AnchorHead': make_dense_head,
    'mmactnn.adapters.fpn.LayeredFPN': FusedFPN,
    'mmdet.models.roi_heads.mask_heads.fcn_mask_head.FCNMaskHead': (
        FusedMaskHead
    ),
    'mmdet.models.necks.fpn.FPN': FusedFPN,
    'mmseg.models.necks.fpn.FPN': FusedFPN,
    'mmpretrain.models.backbones.resnet_cifar.ResNet_CIFAR': _openmmlab_stem,
    'mmpretrain.models.necks.nonlinear_neck.NonLinearNeck': _non_linear_neck,
}
for _package in ('mmdet', 'mmseg', 'mmpretrain'):
    _backbones = f'{_package}.models.backbones'
    _MAKERS[f'{_backbones}.resnet.BasicBlock'] = _openmmlab_block(2)
    _MAKERS[f'{_backbones}.resnet.Bottleneck'] = _openmmlab_block(3)
    _MAKERS[f'{_backbones}.resnet.ResNet'] = _openmmlab_stem
    _MAKERS[f'{_backbones}.hrnet.HRNet'] = _hrnet_stem
