"""Turns the layers of a model into compressed ones, and back."""

import fnmatch
import pkgutil

from torch import nn

from ..adapters import LayeredModule, find_layered
from ..codes.cache import PayloadCache
from ..codes.quantizer import LayerQuantizer, OwnSettings
from ..codes.units import MIB
from ..config import DEFAULT_LEVEL, get_level
from ..fusion import find_fusions, remove_fusions
from ..layers import (
    QAdaptiveAvgPool2d,
    QAvgPool2d,
    QBatchNorm,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QDropout,
    QDropout2d,
    QGate,
    QGroupNorm,
    QLeakyReLU,
    QLinear,
    QMaxPool2d,
    QReLU,
    QReLU6,
    QSiLU,
    QSyncBatchNorm,
    QuantizedLayer,
)
from ..modules.naming import named_modules
from ..offload import HostSwap, attached_swap
from ..offload.allocator import require_expandable_segments
from ..ops import DEFAULT_GROUP_SIZE
from ..precision.controller import AdaptivePrecision
from ..random import RoundingGenerator
from .filters import Filter
from .report import ConversionReport, Converted, Fused, Layered, Left

# By full name, so that MMCV and MMEngine need not be imported, nor installed.
# Exact types only: a subclass may compute something else. A string names a
# class that needs the package of the one it stands for.
CONVERSIONS = {
    'torch.nn.modules.conv.Conv1d': QConv1d,
    'torch.nn.modules.conv.Conv2d': QConv2d,
    'torch.nn.modules.conv.Conv3d': QConv3d,
    'torch.nn.modules.conv.ConvTranspose1d': QConvTranspose1d,
    'torch.nn.modules.conv.ConvTranspose2d': QConvTranspose2d,
    'torch.nn.modules.conv.ConvTranspose3d': QConvTranspose3d,
    'torch.nn.modules.linear.Linear': QLinear,
    'mmcv.cnn.bricks.wrappers.Conv2d': QConv2d,
    'mmcv.cnn.bricks.wrappers.Conv3d': QConv3d,
    'mmcv.cnn.bricks.wrappers.ConvTranspose2d': QConvTranspose2d,
    'mmcv.cnn.bricks.wrappers.ConvTranspose3d': QConvTranspose3d,
    'mmcv.cnn.bricks.wrappers.Linear': QLinear,
    'torch.nn.modules.batchnorm.BatchNorm1d': QBatchNorm1d,
    'torch.nn.modules.batchnorm.BatchNorm2d': QBatchNorm2d,
    'torch.nn.modules.batchnorm.BatchNorm3d': QBatchNorm3d,
    'torch.nn.modules.normalization.GroupNorm': QGroupNorm,
    'torch.nn.modules.batchnorm.SyncBatchNorm': QSyncBatchNorm,
    # What type='SyncBN' builds.
    'mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm': QSyncBatchNorm,
    'mmcv.ops.sync_bn.SyncBatchNorm': QSyncBatchNorm,
    'mmengine.model.utils._BatchNormXd': QBatchNorm,
    'torch.nn.modules.activation.ReLU': QReLU,
    'torch.nn.modules.activation.ReLU6': QReLU6,
    'torch.nn.modules.activation.LeakyReLU': QLeakyReLU,
    'torch.nn.modules.activation.SiLU': QSiLU,
    'mmcv.cnn.bricks.swish.Swish': 'mmactnn.adapters.activations:QSwish',
    'torch.nn.modules.pooling.MaxPool2d': QMaxPool2d,
    'mmcv.cnn.bricks.wrappers.MaxPool2d': QMaxPool2d,
    'torch.nn.modules.pooling.AvgPool2d': QAvgPool2d,
    'torch.nn.modules.pooling.AdaptiveAvgPool2d': QAdaptiveAvgPool2d,
    'torch.nn.modules.dropout.Dropout': QDropout,
    'torch.nn.modules.dropout.Dropout2d': QDropout2d,
    'mmcv.cnn.bricks.drop.Dropout': QDropout,
    'mmactnn.layers.gate.Gate': QGate,
}

# Smaller codes stay on the device: the call would cost more than it saves.
_MIN_SWAPPED_CODES = MIB // 4

# What an image has: colours and maybe depth or transparency.
_MAX_IMAGE_CHANNELS = 4

# Layers that keep nothing large for the backward pass.
_KEEP_NOTHING = (
    nn.Identity,
    # Empty ones.
    nn.ModuleList,
    nn.Sequential,
    nn.Upsample,
    nn.Flatten,
    nn.Unflatten,
    nn.ZeroPad2d,
)


def convert_model(
    model,
    level=DEFAULT_LEVEL,
    include=None,
    exclude=(),
    group_size=DEFAULT_GROUP_SIZE,
    generator=None,
    num_samples=None,
):
    """Make the layers of a model keep codes instead of activations.

    Modules that are known to call functions where they could call layers
    (:mod:`mmactnn.adapters`) get these layers first.

    Works in place by giving modules another class: parameters, buffers,
    hooks, ``state_dict`` keys, optimisers and wrappers such as
    DistributedDataParallel stay valid. Layers that are compressed already
    take the new level (but keep bits and group size that their constructor
    fixed, at every level but L0), so that the level of a model can be changed
    at any time; those that the filters leave out stay what they are.

    Args:
        model (nn.Module): The model, with or without a wrapper.
        level (str | dict | Level, optional): Level, see
            :func:`mmactnn.get_level`. Defaults to ``'L3'``.
        include (Sequence[str | type], optional): Convert only what matches
            one of these: a glob pattern of qualified names
            (``'backbone.*'``), the name of a class (``'Conv2d'``) or a class.
            Defaults to everything.
        exclude (Sequence[str | type], optional): Leave what matches one of
            these, even if included. Defaults to nothing.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to 256.
        generator (RoundingGenerator, optional): Source of random bits for
            the model's layers. Defaults to a new one that follows
            ``torch.manual_seed``.
        num_samples (int, optional): Size of the dataset, for levels with
            ``use_gradient``; see :class:`mmactnn.AdaptivePrecision`.

    Returns:
        ConversionReport: What was converted, what was left, and why. Prints
        as a summary.

    Raises:
        ValueError: If the level or the group size is unknown, a pattern
            matches no layer, or the level follows gradients of samples and
            ``num_samples`` is not given.
        RuntimeError: If the level wants expandable segments of the CUDA
            allocator, and there are none.
        TypeError: If ``model`` is not a module or a filter neither a string
            nor a class.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be an nn.Module, got {type(model).__name__}'
        )
    level = get_level(level)
    generator = generator or RoundingGenerator()
    precision = _make_precision(level, num_samples)
    if level.expandable:
        require_expandable_segments()
    include = None if include is None else Filter('include', include)
    exclude = Filter('exclude', exclude)
    chosen, left = [], []
    plans = find_layered(model)
    for name, module in _all_modules(model, plans):
        target = _target(module)
        if target is None:
            # Containers hold what is listed by itself.
            if next(module.children(), None) is None:
                left.append(
                    Left(name, type(module).__name__, _why_left(module))
                )
            continue
        excluded = exclude.matches(name, module)
        included = include is None or include.matches(name, module)
        if excluded or not included:
            reason = 'excluded' if excluded else 'not included'
            left.append(Left(name, type(module).__name__, reason))
            continue
        chosen.append((name, module, target))
    for used in (include, exclude):
        if used is not None:
            used.require_all_used()
    _require_rules_used(level, [name for name, *_ in chosen])
    layers = {module for _, module, _ in chosen}
    plans = [
        plan
        for plan in plans.values()
        if not layers.isdisjoint(plan.layers.values())
    ]
    added = {plan.module: plan.layers for plan in plans}
    fusions = _find_fusions(model, level, chosen, added)
    rectified = {
        layer: fusion.rectified_bits(level)
        for fusion in fusions.values()
        # Codes of a ReLU's output are for the convolutions that read it.
        for layer in (
            fusion.norms
            if level.conv is None
            else (*fusion.norms, *fusion.relus)
        )
    }
    cache = PayloadCache()
    quantizers = []
    for name, module, target in chosen:
        own = OwnSettings()
        if isinstance(module, QuantizedLayer):
            own = module.quantizer.own
        quantizers.append(
            LayerQuantizer.for_level(
                target,
                level,
                group_size,
                generator,
                own,
                name,
                precision,
                rectified.get(module),
                bool(rectified) and _reads_images(module),
                cache,
            )
        )
    # Nothing is left to fail: a call that raises has changed no layer.
    before = _precisions(model)
    remove_fusions(model)
    layered = tuple(_install(plan) for plan in plans)
    converted = tuple(
        _convert(*choice, quantizer)
        for choice, quantizer in zip(chosen, quantizers)
    )
    for fusion in fusions.values():
        fusion.install()
    for unused in before - _precisions(model):
        unused.detach()
    if precision is not None and precision.slots:
        precision.attach(model)
    _swap(model, level)
    blocks = tuple(
        Fused(name, type(fusion.module).__name__, len(fusion.norms))
        for name, fusion in fusions.items()
    )
    return ConversionReport(
        level.name, converted, tuple(left), blocks, layered
    )


def revert_model(model):
    """Make compressed layers plain ones again, in place.

    Args:
        model (nn.Module): The model.

    Returns:
        list[str]: Qualified names of what was reverted: of layers, and of
        modules that call functions again.
    """
    names = []
    for precision in _precisions(model):
        precision.detach()
    swap = attached_swap(model)
    if swap is not None:
        swap.detach()
    remove_fusions(model)
    # Lists, because layered modules drop their layers.
    for name, module in list(named_modules(model)):
        if isinstance(module, LayeredModule):
            module.revert_()
            names.append(name)
    for name, module in list(named_modules(model)):
        if isinstance(module, QuantizedLayer):
            module.revert_()
            names.append(name)
    return names


def get_precision(model):
    """What shares out the bits of a model.

    Args:
        model (nn.Module): A model that was converted at an adaptive level.

    Returns:
        AdaptivePrecision: For :meth:`AdaptivePrecision.set_samples`, for its
        state, and for the bits in force.

    Raises:
        ValueError: If the model has none, or its parts have several.
    """
    found = _precisions(model)
    if len(found) != 1:
        raise ValueError(
            'expected a model that one call has converted at an adaptive '
            f'level, got one with {len(found)} of them'
        )
    return found.pop()


def _all_modules(model, plans):
    """All modules of a model, and the layers that it is about to get."""
    for name, module in named_modules(model):
        yield name, module
        if module in plans:
            yield from plans[module].named_layers.items()


def _install(plan):
    """Let a module call layers; what the report says of it."""
    source = type(plan.module).__name__
    plan.install()
    return Layered(plan.name, source, plan.target.__name__, tuple(plan.layers))


def _precisions(model):
    """What the layers of a model take their bits from."""
    return {
        module.quantizer.slot.precision
        for module in model.modules()
        if isinstance(module, QuantizedLayer)
        and module.quantizer.slot is not None
    }


def _make_precision(level, num_samples):
    if not level.adaptive:
        return None
    if level.use_gradient and num_samples is None:
        raise ValueError(
            f'level {level.name} has use_gradient=True and needs num_samples, '
            'the size of the dataset, got None'
        )
    return AdaptivePrecision(num_samples if level.use_gradient else None)


def _reads_images(module):
    """Whether a layer is a convolution of very few channels."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and module.groups == 1
        and module.in_channels <= _MAX_IMAGE_CHANNELS
    )


def _find_fusions(model, level, chosen, added):
    """By name, the blocks of a model that a level fuses.

    Layers that the filters leave out take part as they are.
    ``added`` are those that modules are about to get.
    """
    targets = {
        module: type(module)
        for module in model.modules()
        if isinstance(module, QuantizedLayer)
        and (module.quantizer.fused_bits or module.kind == 'mask')
        and not module.quantizer.exact
    }
    fuses = level.fuse and level.norm is not None and level.mask
    for name, module, target in chosen:
        targets.pop(module, None)
        rule = level.rule_for(name)
        if fuses and not (rule is not None and rule.bits is None):
            targets[module] = target
    return find_fusions(model, targets, added)


def _swap(model, level):
    """Let a model swap, or no more, as its level says."""
    before = attached_swap(model)
    if before is not None:
        before.detach()
    if level.swap:
        min_bytes = MIB if level.exact else _MIN_SWAPPED_CODES
        HostSwap(model, min_bytes, level.max_host_mib).attach()


def _require_rules_used(level, names):
    for rule in level.rules:
        if not any(fnmatch.fnmatchcase(name, rule.pattern) for name in names):
            raise ValueError(
                f'rule {rule.pattern!r} of level {level.name} matches no '
                'layer that is converted'
            )


def _mapped(module):
    """The compressed class for a module's class, or None."""
    if isinstance(module, QuantizedLayer):
        return type(module)
    cls = type(module)
    target = CONVERSIONS.get(f'{cls.__module__}.{cls.__qualname__}')
    return pkgutil.resolve_name(target) if isinstance(target, str) else target


def _target(module):
    """The compressed class for a module, or None."""
    target = _mapped(module)
    if target is None or target.why_exact(module) is not None:
        return None
    return target


def _convert(name, module, target, quantizer):
    source = type(module).__name__
    if isinstance(module, QuantizedLayer):
        module.quantizer = quantizer
    else:
        target.convert_(module, quantizer)
    return Converted(
        name,
        source,
        target.__name__,
        quantizer.bits,
        quantizer.slot is not None,
    )


def _why_left(module):
    target = _mapped(module)
    if target is not None:
        return target.why_exact(module)
    if isinstance(module, _KEEP_NOTHING):
        return 'keeps nothing'
    for base in type(module).__mro__[1:]:
        known = f'{base.__module__}.{base.__qualname__}' in CONVERSIONS
        if known:
            return f'subclass of {base.__name__}, may compute otherwise'
    return 'no compressed layer of this type'
