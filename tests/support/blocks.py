"""Blocks that can be fused, of every toolbox, small."""

import torch
from torch import nn

from support.torchvision_stub import make_torchvision_importable


def _perturb(module):
    """Weights and biases of normalisations that nobody starts with."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
    return module


def _downsample(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _torchvision(name, stride=1):
    make_torchvision_importable()
    from torchvision.models import resnet

    cls = getattr(resnet, name)
    width = 16 // cls.expansion
    if stride == 1:
        return cls(16, width)
    shortcut = _downsample(16, 2 * width * cls.expansion, stride)
    return cls(16, 2 * width, stride, shortcut)


def _openmmlab(package, name, stride=1, **kwargs):
    if package == 'mmpretrain':
        make_torchvision_importable()
    module = __import__(f'{package}.models.backbones.resnet', fromlist=[name])
    cls = getattr(module, name)
    if package == 'mmpretrain':
        outputs = 16 * stride
        shortcut = _downsample(16, outputs, stride) if stride > 1 else None
        return cls(16, outputs, stride=stride, downsample=shortcut, **kwargs)
    width = 16 // cls.expansion * stride
    shortcut = None
    if stride > 1:
        shortcut = _downsample(16, width * cls.expansion, stride)
    return cls(16, width, stride, downsample=shortcut, **kwargs)


def _torchvision_stem():
    make_torchvision_importable()
    from torchvision.models.resnet import BasicBlock, ResNet

    return nn.Sequential(nn.Conv2d(16, 3, 1), ResNet(BasicBlock, [1, 1, 1, 1]))


def _stem(package, name='ResNet'):
    if package == 'mmpretrain':
        make_torchvision_importable()
    module = __import__(f'{package}.models.backbones', fromlist=[name])
    resnet = getattr(module, name)(
        depth=18,
        in_channels=16,
        base_channels=16,
        stem_channels=16,
        num_stages=1,
        strides=(1,),
        dilations=(1,),
        out_indices=(0,),
        norm_eval=False,
    )
    return nn.Sequential(resnet, First())


def _hrnet():
    from mmseg.models.backbones import HRNet

    extra = {
        f'stage{count}': dict(
            num_modules=1,
            num_branches=count,
            block='BASIC',
            num_blocks=(1,) * count,
            num_channels=(8, 16, 32, 64)[:count],
        )
        for count in range(1, 5)
    }
    hrnet = HRNet(
        extra, in_channels=16, norm_eval=False, multiscale_output=False
    )
    return nn.Sequential(hrnet, First())


def _non_linear_neck(num_layers=2):
    make_torchvision_importable()
    from mmpretrain.models.necks import NonLinearNeck

    neck = NonLinearNeck(
        16,
        16,
        8,
        num_layers,
        with_avg_pool=False,
        norm_cfg=dict(type='BN1d'),
    )
    return PerPosition(neck)


class PerPosition(nn.Module):
    """Calls a neck with every position as a sample of its own."""

    def __init__(self, neck):
        super().__init__()
        self.neck = neck

    def forward(self, x):
        positions = x.flatten(2).transpose(1, 2)
        (output,) = self.neck((positions.flatten(0, 1),))
        return output.unflatten(0, positions.shape[:2])


class First(nn.Module):
    """The first of several outputs."""

    def forward(self, outputs):
        return outputs[0]


def _conv_module(norm_cfg=dict(type='BN')):  # noqa: B006
    from mmcv.cnn import ConvModule

    return ConvModule(16, 16, 3, padding=1, norm_cfg=norm_cfg)


def _dense_layer():
    make_torchvision_importable()
    from torchvision.models.densenet import _DenseLayer

    return _DenseLayer(16, 8, 2, 0.0)


def _sequential():
    return nn.Sequential(
        nn.Conv2d(16, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
    )


# Blocks to build, with the number of their fused normalisations.
BLOCKS = {
    'torchvision basic': (lambda: _torchvision('BasicBlock'), 2),
    'torchvision basic, stride': (lambda: _torchvision('BasicBlock', 2), 3),
    'torchvision bottleneck': (lambda: _torchvision('Bottleneck'), 3),
    'torchvision bottleneck, stride': (
        lambda: _torchvision('Bottleneck', 2),
        4,
    ),
    'mmdet basic': (lambda: _openmmlab('mmdet', 'BasicBlock'), 2),
    'mmdet bottleneck': (lambda: _openmmlab('mmdet', 'Bottleneck'), 3),
    'mmdet bottleneck, stride': (
        lambda: _openmmlab('mmdet', 'Bottleneck', 2),
        4,
    ),
    'mmseg basic, stride': (lambda: _openmmlab('mmseg', 'BasicBlock', 2), 3),
    'mmseg bottleneck': (lambda: _openmmlab('mmseg', 'Bottleneck'), 3),
    'mmpretrain basic': (lambda: _openmmlab('mmpretrain', 'BasicBlock'), 2),
    'mmpretrain bottleneck, stride': (
        lambda: _openmmlab('mmpretrain', 'Bottleneck', 2),
        4,
    ),
    # Its sum is not an addition alone.
    'mmpretrain drop path': (
        lambda: _openmmlab('mmpretrain', 'Bottleneck', drop_path_rate=0.5),
        2,
    ),
    'mmdet with_cp': (
        lambda: _openmmlab('mmdet', 'Bottleneck', with_cp=True),
        0,
    ),
    'mmdet stem': (lambda: _stem('mmdet'), 5),
    'mmseg deep stem': (lambda: _stem('mmseg', 'ResNetV1c'), 7),
    'mmpretrain CIFAR stem': (
        lambda: _stem('mmpretrain', 'ResNet_CIFAR'),
        5,
    ),
    # Normalisations before an addition are not fused.
    'mmseg HRNet': (_hrnet, 27),
    'mmpretrain neck': (_non_linear_neck, 1),
    'mmpretrain neck of three': (lambda: _non_linear_neck(3), 2),
    'torchvision ResNet': (_torchvision_stem, 12),
    'ConvModule': (_conv_module, 1),
    'ConvModule without norm': (lambda: _conv_module(None), 0),
    'dense layer': (_dense_layer, 2),
    'Sequential': (_sequential, 1),
}


def make_block(name, seed=0):
    """A block in training mode.

    Args:
        name (str): One of BLOCKS.
        seed (int, optional): Of its weights. Defaults to 0.

    Returns:
        nn.Module: Takes Tensor[N, 16, H, W].
    """
    torch.manual_seed(seed)
    return _perturb(BLOCKS[name][0]()).train()
