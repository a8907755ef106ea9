"""Blocks whose normalisation, addition and ReLU run as one.

A model is searched for modules that compute as some known class does. Each
gets an object in place of its ``forward`` that calls the same submodules:
parameters, ``state_dict`` keys and hooks of the model stay what they are.
Anything that is not known runs layer by layer.
"""

import contextlib

import torch
from torch import nn

from .layers import (
    QBatchNorm,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QReLU,
    QSyncBatchNorm,
)
from .wrapping import named_modules

_NORMS = (QBatchNorm, QBatchNorm1d, QBatchNorm2d, QBatchNorm3d, QSyncBatchNorm)


class FusedPairs:
    """A module whose forward pass calls a ReLU right after a normalisation.

    Its class's own forward pass runs; as long as it does, the normalisations
    rectify, and the ReLUs pass on what is rectified already.

    The object takes the place of the module's ``forward``, as an attribute of
    the instance that copies and pickles go along with.

    Args:
        module (nn.Module): The module.
        pairs (Sequence[tuple[str, str]]): Names of the normalisations and of
            their ReLUs in the module.
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
        return [getattr(self.module, norm) for norm, _ in self.pairs]

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
            (norm, relu)
            for norm, relu in self.pairs
            if is_norm(getattr(self.module, norm))
            and is_relu(getattr(self.module, relu))
        )
        return self if self.pairs else None

    def __call__(self, *args, **kwargs):
        """See the module's own ``forward``."""
        with self._fusing():
            return self._unfused(*args, **kwargs)

    def _unfused(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)

    @contextlib.contextmanager
    def _fusing(self):
        """Let the normalisations take part, but where somebody looks."""
        norms = self._taking_part() if self.is_active else {}
        for norm, relu in norms.items():
            norm.fusing = 'norm' if relu is None else 'norm and ReLU'
        try:
            yield
        finally:
            for norm in norms:
                norm.fusing = None

    @property
    def is_active(self):
        """bool: Whether the module is being trained, and compressed.

        What has been wrapped outlives the model's reversal.
        """
        return (
            self.module.training
            and torch.is_grad_enabled()
            and all(isinstance(norm, _NORMS) for norm in self.norms)
        )

    def _taking_part(self):
        """Normalisations of this pass, with their ReLUs."""
        pairs = (
            (getattr(self.module, norm), getattr(self.module, relu))
            for norm, relu in self.pairs
        )
        return {n: r for n, r in pairs if not _hooked(n, r)}


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
        super().__init__(module, [(norm, 'relu') for norm in norms[:-1]])
        self.convs = tuple(convs)
        self.last_norm = norms[-1]

    @property
    def norms(self):
        """list[nn.Module]: All normalisations that are fused."""
        last = getattr(self.module, self.last_norm)
        return [*super().norms, last, *self._shortcut_norms()]

    def keep(self, is_norm, is_relu):
        """See the base class."""
        if is_relu(self.module.relu) and all(map(is_norm, self.norms)):
            return self
        return FusedPairs(self.module, self.pairs).keep(is_norm, is_relu)

    def __call__(self, x):
        """See the block's own ``forward``."""
        block = self.module
        last_norm = getattr(block, self.last_norm)
        if not self.is_active or _hooked(last_norm, block.relu):
            return super().__call__(x)
        convs = [getattr(block, conv) for conv in self.convs]
        with self._fusing():
            # First, though the block's own forward pass has it last: the
            # backward pass then comes to it when the other branch's gradients
            # are gone.
            shortcut = x if block.downsample is None else block.downsample(x)
            out = x
            for conv, norm in zip(convs, super().norms):
                out = block.relu(norm(conv(out)))
            out = convs[-1](out)
        if last_norm.fuses(out, shortcut):
            return last_norm.norm_act(out, relu=True, residual=shortcut)
        return block.relu(last_norm(out) + shortcut)

    def _shortcut_norms(self):
        shortcut = self.module.downsample
        modules = () if shortcut is None else shortcut.modules()
        return [
            module
            for module in modules
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]

    def _taking_part(self):
        alone = dict.fromkeys(self._shortcut_norms())
        return {**alone, **super()._taking_part()}


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


def _hooked(*layers):
    """Whether somebody wants to see what goes in or out of a layer."""
    return any(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        for layer in layers
    )


def _sequential(module):
    names = list(module._modules)
    return FusedPairs(module, zip(names, names[1:]))


def _conv_module(module):
    follow = module.order.index('act') == module.order.index('norm') + 1
    if not (follow and module.with_norm and module.with_activation):
        return None
    return FusedConvModule(module, [(module.norm_name, 'activate')])


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
            return FusedPairs(module, [(norm, 'relu') for norm in norms[:-1]])
        return FusedResidual(module, convs, norms)

    return make


def _openmmlab_stem(module):
    if module.deep_stem:  # an nn.Sequential
        return None
    return FusedPairs(module, [(module.norm1_name, 'relu')])


def _dense_layer(module):
    if module.memory_efficient:
        return None
    return FusedPairs(module, [('norm1', 'relu1'), ('norm2', 'relu2')])


# By the class that defines `forward`: subclasses that do not are known, too.
_MAKERS = {
    'torch.nn.modules.container.Sequential': _sequential,
    'torchvision.models.resnet.BasicBlock': _torchvision_block(2),
    'torchvision.models.resnet.Bottleneck': _torchvision_block(3),
    'torchvision.models.resnet.ResNet': lambda module: FusedPairs(
        module, [('bn1', 'relu')]
    ),
    'torchvision.models.densenet._DenseLayer': _dense_layer,
    'mmcv.cnn.bricks.conv_module.ConvModule': _conv_module,
}
for _package in ('mmdet', 'mmseg', 'mmpretrain'):
    _module = f'{_package}.models.backbones.resnet'
    _MAKERS[f'{_module}.BasicBlock'] = _openmmlab_block(2)
    _MAKERS[f'{_module}.Bottleneck'] = _openmmlab_block(3)
    _MAKERS[f'{_module}.ResNet'] = _openmmlab_stem
