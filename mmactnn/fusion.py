"""Blocks whose normalisation, addition and ReLU run as one.

A model is searched for modules that compute as some known class does. Each
gets an object in place of its ``forward`` that calls the same submodules:
parameters, ``state_dict`` keys and hooks of the model stay what they are.
Anything that is not known runs layer by layer.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from .layers import (
    QBatchNorm,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QReLU,
    QSyncBatchNorm,
)
from .layers.norm import Fusing
from .wrapping import named_modules

_NORMS = (QBatchNorm, QBatchNorm1d, QBatchNorm2d, QBatchNorm3d, QSyncBatchNorm)


class Pair(NamedTuple):
    """Names of a normalisation and its neighbours in a module.

    Attributes:
        conv (str, optional): The convolution whose output it takes, and
            nothing else does.
        norm (str): The normalisation.
        relu (str): The ReLU that follows.
    """

    conv: str | None
    norm: str
    relu: str


class FusedPairs:
    """A module whose forward pass calls a ReLU right after a normalisation.

    Its class's own forward pass runs; as long as it does, the normalisations
    rectify, and the ReLUs pass on what is rectified already.

    The object takes the place of the module's ``forward``, as an attribute of
    the instance that copies and pickles go along with.

    Args:
        module (nn.Module): The module.
        pairs (Sequence[Pair]): Its normalisations that a ReLU follows.
    """

    def __init__(self, module, pairs):
        self.module = module
        self.pairs = tuple(pairs)

    def install(self):
        """Compute the module's forward pass from now on."""
        self.module.forward = self

    @property
    def norms(self):
        """list[nn.Module]: All normalisations that are fused."""
        return [getattr(self.module, pair.norm) for pair in self.pairs]

    def keep(self, is_norm, is_relu):
        """Leave out what is not made of compressed layers.

        Args:
            is_norm (Callable): Tells whether a module is or will be a
                normalisation that can be fused ...
            is_relu (Callable): ... and the same of ReLU.

        Returns:
            FusedPairs, optional: This object; None if nothing is left.
        """
        self.pairs = tuple(
            pair
            for pair in self.pairs
            if is_norm(getattr(self.module, pair.norm))
            and is_relu(getattr(self.module, pair.relu))
        )
        return self if self.pairs else None

    def __call__(self, *args, **kwargs):
        """See the module's own ``forward``."""
        if not self.is_active:
            return self._unfused(*args, **kwargs)
        norms = self._fuse()
        try:
            return self._unfused(*args, **kwargs)
        finally:
            _part(norms)

    def _unfused(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def is_active(self):
        """bool: Whether the module is being trained."""
        return self.module.training and torch.is_grad_enabled()

    def _fuse(self):
        """Let the normalisations take part, but where somebody looks.

        Returns:
            list[nn.Module]: Those that do, until :func:`_part`.
        """
        modules = self.module._modules
        norms = []
        for pair in self.pairs:
            norm, relu = modules[pair.norm], modules[pair.relu]
            if _may_join(norm) and not _hooked(relu):
                _join(norm, True, modules.get(pair.conv))
                norms.append(norm)
        return norms


class FusedConvModule(FusedPairs):
    """MMCV's ``ConvModule``, which may be told to leave out its ReLU."""

    def __call__(self, x, activate=True, norm=True):
        """See ``ConvModule``."""
        if activate:
            return super().__call__(x, activate, norm)
        return self._unfused(x, activate, norm)


class FusedResidual(FusedPairs):
    """A residual block: ``relu(norm(conv(...)) + shortcut)``.

    Args:
        module (nn.Module): The block.
        convs (Sequence[str]): Names of its convolutions, in their order.
        norms (Sequence[str]): Names of the normalisations that follow them.
    """

    def __init__(self, module, convs, norms):
        inner = zip(convs[:-1], norms[:-1])
        super().__init__(module, [Pair(*names, 'relu') for names in inner])
        self.last_conv = convs[-1]
        self.last_norm = norms[-1]

    @property
    def norms(self):
        """list[nn.Module]: All normalisations that are fused."""
        last = getattr(self.module, self.last_norm)
        return [*super().norms, last, *(n for _, n in self._shortcut())]

    def keep(self, is_norm, is_relu):
        """See the base class."""
        if is_relu(self.module.relu) and all(map(is_norm, self.norms)):
            return self
        return FusedPairs(self.module, self.pairs).keep(is_norm, is_relu)

    def __call__(self, x):
        """See the block's own ``forward``."""
        modules = self.module._modules
        relu = modules['relu']
        last_conv, last_norm = modules[self.last_conv], modules[self.last_norm]
        if not (self.is_active and _may_join(last_norm)) or _hooked(relu):
            return super().__call__(x)
        norms = self._fuse()
        try:
            # First, though the block's own forward pass has it last: the
            # backward pass then comes to it when the other branch's gradients
            # are gone.
            downsample = modules.get('downsample')
            shortcut = x if downsample is None else downsample(x)
            out = x
            for conv, norm, _ in self.pairs:
                out = relu(modules[norm](modules[conv](out)))
            out = last_conv(out)
        finally:
            _part(norms)
        if last_norm.fuses(out, shortcut):
            fusing = Fusing(True, _is_only_reader(last_conv))
            return last_norm.norm_act(out, fusing, shortcut)
        return relu(last_norm(out) + shortcut)

    def _fuse(self):
        """See the base class; the shortcut's are not rectified."""
        norms = super()._fuse()
        for conv, norm in self._shortcut():
            if _may_join(norm):
                _join(norm, False, conv)
                norms.append(norm)
        return norms

    def _shortcut(self):
        """Normalisations of the shortcut, after what each of them reads."""
        shortcut = self.module._modules.get('downsample')
        if not isinstance(shortcut, nn.Sequential):
            return []
        layers = list(shortcut._modules.values())
        return [
            (conv, norm)
            for conv, norm in zip([None, *layers], layers)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        ]


def _may_join(norm):
    """Whether a normalisation can take part now.

    A block that has been wrapped stays what it is when the model is reverted.
    """
    return isinstance(norm, _NORMS) and not _hooked(norm)


def _join(norm, relu, conv):
    """Let a normalisation take part in a block that is fused."""
    # Straight into the instance: that of nn.Module takes its time.
    norm.__dict__['fusing'] = Fusing(relu, _is_only_reader(conv))


def _part(norms):
    """Let normalisations run by themselves again."""
    for norm in norms:
        norm.__dict__.pop('fusing', None)


def _is_only_reader(conv):
    """Whether nobody but the next layer sees what a layer returns.

    Args:
        conv (nn.Module, optional): The layer, or None where another may.
    """
    return (
        isinstance(conv, nn.modules.conv._ConvNd)
        and not _hooked(conv)
        and not module_hooks._global_forward_hooks
        and not module_hooks._global_forward_pre_hooks
    )


def find_fusions(model, targets):
    """What of a model can be fused.

    Args:
        model (nn.Module): The model, converted or about to be.
        targets (dict[nn.Module, type]): The compressed classes of its layers
            that are compressed or about to be.

    Returns:
        dict[str, FusedPairs]: By the qualified name of a module, what is to
        compute its forward pass; not installed.
    """

    def is_norm(module):
        return targets.get(module) in _NORMS

    def is_relu(module):
        return targets.get(module) is QReLU

    found = {}
    for name, module in named_modules(model):
        make = _MAKERS.get(_forward_of(module))
        fusion = None if make is None else make(module)
        fusion = fusion and fusion.keep(is_norm, is_relu)
        if fusion is not None:
            found[name] = fusion
    return found


def remove_fusions(model):
    """Let all modules of a model compute by themselves again.

    Args:
        model (nn.Module): The model.
    """
    for module in model.modules():
        if isinstance(vars(module).get('forward'), FusedPairs):
            del module.forward


def _forward_of(module):
    """Full name of the class that a module has its forward pass from.

    None if somebody else has put something in its place, as MMEngine does
    for activation checkpointing.
    """
    if not isinstance(vars(module).get('forward'), (type(None), FusedPairs)):
        return None
    for cls in type(module).__mro__:
        if 'forward' in vars(cls):
            return f'{cls.__module__}.{cls.__qualname__}'
    return None


def _hooked(layer):
    """Whether somebody wants to see what goes in or out of a layer."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def _sequential(module):
    names = list(module._modules)
    return FusedPairs(module, map(Pair, [None, *names], names, names[1:]))


def _conv_module(module):
    order = list(module.order)
    follow = order.index('act') == order.index('norm') + 1
    if not (follow and module.with_norm and module.with_activation):
        return None
    conv = 'conv' if order.index('norm') == order.index('conv') + 1 else None
    pair = Pair(conv, module.norm_name, 'activate')
    return FusedConvModule(module, [pair])


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
    'mmpretrain.models.backbones.resnet_cifar.ResNet_CIFAR': _openmmlab_stem,
    'mmpretrain.models.necks.nonlinear_neck.NonLinearNeck': _non_linear_neck,
}
for _package in ('mmdet', 'mmseg', 'mmpretrain'):
    _backbones = f'{_package}.models.backbones'
    _MAKERS[f'{_backbones}.resnet.BasicBlock'] = _openmmlab_block(2)
    _MAKERS[f'{_backbones}.resnet.Bottleneck'] = _openmmlab_block(3)
    _MAKERS[f'{_backbones}.resnet.ResNet'] = _openmmlab_stem
    _MAKERS[f'{_backbones}.hrnet.HRNet'] = _hrnet_stem
