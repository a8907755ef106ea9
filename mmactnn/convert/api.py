"""Conversion of a model's layers to compressed ones, and back."""

import dataclasses
import fnmatch
import functools
from typing import NamedTuple

from torch import nn

from ..adapters import Adapter, find_adapters
from ..codes.cache import PayloadCache
from ..codes.quantizer import LayerQuantizer, OwnSettings
from ..codes.units import MIB
from ..config import DEFAULT_LEVEL, LEVELS, check_flag, checked, get_level
from ..functional import (
    FunctionSettings,
    calls_functions,
    remove_scopes,
    set_scope,
)
from ..fusion import FoundFusions, find_fusions, fuse, is_fused, unfuse
from ..layers import QuantizedLayer
from ..modules.functions import reads_first_only
from ..modules.layout import use_channels_last
from ..modules.naming import named_modules
from ..modules.sharing import alias_of, shared_layers
from ..offload import HostSwap, attached_swap
from ..offload.allocator import require_expandable_segments
from ..ops import DEFAULT_GROUP_SIZE
from ..precision import AdaptivePrecision
from ..random import RoundingGenerator
from ..registry import FunctionEntry, default_registry
from ..segments import (
    BlockParts,
    make_segment,
    segments_replaced,
    undo_segments,
)
from .filters import Filter
from .report import (
    Adapted,
    ConversionReport,
    Converted,
    Fused,
    Left,
    Scoped,
    Segment,
    Unfused,
    Unsegmented,
)
from .segments import (
    divide_layers,
    find_blocks,
    is_within,
    segment_bits,
    segment_quantizer,
    without_parts,
)

# Bytes of codes below which swapping costs more than it saves.
_MIN_SWAPPED_CODES = MIB // 4

# Channels of an image: colours and depth or transparency.
_MAX_IMAGE_CHANNELS = 4

# Layers that keep nothing large for the backward pass.
_KEEP_NOTHING = (
    nn.Identity,
    # Containers without children.
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
    filter_fn=None,
    channels_last=False,
):
    """Convert the layers of a model to compressed ones, in place.

    Compressed layers keep codes instead of activations. Functions that a
    module calls become layers first, if there is an adapter for the module
    (:mod:`mmactnn.adapters`); others are compressed where they are called
    (:mod:`mmactnn.functional`), and are like layers of the module to filters
    and rules, such as ``'blocks.0.relu'``.

    Modules only change their class: parameters, buffers, hooks,
    ``state_dict`` keys, optimisers and wrappers such as
    DistributedDataParallel stay valid. The level of a model can be changed
    at any time by another call. Bits and group size from a layer's
    constructor override the level's, except at L0. Layers that the filters
    exclude are not changed.

    Args:
        model (nn.Module): The model, with or without a wrapper.
        level (str | dict | Level, optional): Level, see
            :func:`mmactnn.get_level`. Defaults to ``'L3'``.
        include (Sequence[str | type], optional): Filters, of which a layer
            must match one: glob patterns of qualified names
            (``'backbone.*'``), names of classes (``'Conv2d'``) or classes.
            Defaults to all layers.
        exclude (Sequence[str | type], optional): Filters, of which a layer
            must match none. Defaults to ().
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to 256.
        generator (RoundingGenerator, optional): Source of random bits for
            the model's layers. Defaults to a new one that follows
            ``torch.manual_seed``.
        num_samples (int, optional): Size of the dataset, for levels with
            ``use_gradient``; see :class:`mmactnn.AdaptivePrecision`.
        filter_fn (Callable, optional): Function ``filter_fn(module, name)``
            of a layer and its qualified name that returns whether to convert
            it, in addition to ``include`` and ``exclude``. With it, functions
            that modules call are left to torch. Defaults to all.
        channels_last (bool, optional): Whether convolutions get weights, and
            with them outputs, in the layout channels_last, which is faster on
            GPUs for most of them. Defaults to False.

    Returns:
        ConversionReport: Layers that were converted, and those that were
        left, with the reason. Prints as a summary.

    Raises:
        ValueError: If the level or the group size is unknown, a pattern
            matches no layer, or the level has ``use_gradient`` and
            ``num_samples`` is not given.
        RuntimeError: If the level requires expandable segments of the CUDA
            allocator, and it does not use them.
        TypeError: If ``model`` is not a module, a filter neither a string
            nor a class, or ``filter_fn`` no function of two arguments.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be an nn.Module, got {type(model).__name__}'
        )
    # First, before local variables refer to layers.
    shared = shared_layers(model)
    channels_last = checked('channels_last', channels_last, check_flag)
    with segments_replaced(model):
        report = _convert_model(
            model,
            shared,
            level,
            include,
            exclude,
            group_size,
            generator,
            num_samples,
            filter_fn,
        )
    if channels_last:
        report = dataclasses.replace(
            report, channels_last=use_channels_last(model)
        )
    return report


def _convert_model(
    model,
    shared,
    level,
    include,
    exclude,
    group_size,
    generator,
    num_samples,
    filter_fn,
):
    """As :func:`convert_model`, for a model without segments."""
    level = get_level(level)
    generator = generator or RoundingGenerator()
    precision = _make_precision(level, num_samples)
    if level.expandable:
        require_expandable_segments()
    include = None if include is None else Filter('include', include)
    exclude = Filter('exclude', exclude)
    adaptable = find_adapters(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            'filter_fn must be a function of a module and its name, got '
            f'{filter_fn!r}'
        )
    chosen, left = _choose_layers(
        model, adaptable.plans, include, exclude, filter_fn
    )
    found = _find_fusions(model, level, chosen)

    def why_filtered(name, module):
        return _why_filtered(name, module, include, exclude, filter_fn)

    segments, unsegmented, sizes = find_blocks(
        model, level, chosen, found.fusions, why_filtered
    )
    callers = [
        caller
        for caller in _choose_functions(model, include, exclude, filter_fn)
        if not is_within(caller.name, segments)
    ]
    for used in (include, exclude):
        if used is not None:
            used.require_all_used()
    names = [item.name for item in chosen]
    names += [name for caller in callers for name in caller.names]
    _require_rules_used(level, [*names, *segments, *unsegmented])
    chosen, recomputed = divide_layers(chosen, segments)
    left += [
        Left(item.name, type(item.module).__name__, 'in a segment')
        for item in recomputed
    ]
    found = without_parts(found, segments)
    layers = {item.module for item in chosen}
    plans = [
        plan
        for plan in adaptable.plans.values()
        if not is_within(plan.name, segments)
        and (not plan.layers or not layers.isdisjoint(plan.layers.values()))
    ]
    coded = _coded_relus(plans, level)
    rectified = {
        layer: level.rectified
        for fusion in found.fusions.values()
        # A ReLU keeps codes of its output for the convolutions that read it.
        for layer in (
            fusion.norms
            if level.conv is None
            else (*fusion.norms, *fusion.relus)
        )
    }
    rectified.update(dict.fromkeys(coded, level.rectified))
    for fusion in found.fusions.values():
        if level.head is not None and fusion.norms and _is_lone(fusion):
            for norm in fusion.norms:
                rectified[norm] = max(level.rectified, level.head)
    cache = PayloadCache()
    quantizers = []
    for item in chosen:
        own = OwnSettings()
        if isinstance(item.module, QuantizedLayer):
            own = item.module.quantizer.own
        quantizers.append(
            LayerQuantizer.for_level(
                item.target,
                level,
                group_size,
                generator,
                own,
                item.name,
                precision,
                rectified.get(item.module),
                bool(rectified) and _reads_images(item.module),
                cache,
            )
        )
    # All checks are done: a call that raises has not changed any layer.
    for module in model.modules():
        if is_fused(module):
            unfuse(module)
    left_scopes = remove_scopes(model)
    adapted = tuple(_install(plan) for plan in plans)
    _set_chains(model, _fuses(level))
    twins = _replace_shared(
        model, shared.intersection(item.module for item in chosen)
    )
    converted = tuple(
        _convert(item, twins.get(item.module, item.module), quantizer)
        for item, quantizer in zip(chosen, quantizers)
    )
    fused = tuple(
        _fuse(name, fusion) for name, fusion in found.fusions.items()
    )
    scoped = ()
    if converted and not level.exact:
        make_settings = functools.partial(
            FunctionSettings,
            level=level,
            group_size=group_size,
            generator=generator,
            cache=cache,
        )
        scoped = tuple(_set_scopes(callers, make_settings))
    else:
        # The model may be a part of one whose functions are compressed.
        for module in left_scopes:
            set_scope(module, None)
    _make_exact(recomputed, group_size, generator, cache)
    for name, module in segments.items():
        make_segment(
            module,
            segment_quantizer(name, level, group_size, generator, cache),
            BlockParts(sizes[name]),
        )
    _swap(model, level)
    unfused = {**found.unfused, **adaptable.refused}
    return ConversionReport(
        level.name,
        converted,
        tuple(left),
        fused,
        adapted,
        tuple(
            Unfused(name, type(module).__name__, reason)
            for name, (module, reason) in unfused.items()
            if _fuses(level)
        ),
        scoped,
        tuple(
            Segment(name, type(module).__name__, segment_bits(name, level))
            for name, module in segments.items()
        ),
        tuple(
            Unsegmented(name, type(module).__name__, reason)
            for name, (module, reason) in unsegmented.items()
        ),
    )


class _Chosen(NamedTuple):
    """A layer that is about to be converted.

    Attributes:
        name (str): Qualified name in the model.
        module (nn.Module): The layer.
        target (type): Compressed class that it gets.
    """

    name: str
    module: nn.Module
    target: type


def _choose_layers(model, plans, include, exclude, filter_fn):
    """Find layers to convert, and reasons for leaving the others."""
    chosen, left = [], []
    for name, module in _all_modules(model, plans):
        entry, reason = default_registry.find_layer(module)
        if entry is not None:
            reason = entry.layer.why_exact(module)
        if reason is None:
            reason = _why_filtered(name, module, include, exclude, filter_fn)
        elif next(module.children(), None) is not None:
            # Children of a container are listed by themselves.
            continue
        elif entry is None and isinstance(module, _KEEP_NOTHING):
            reason = 'keeps nothing'
        if reason is not None:
            left.append(Left(name, type(module).__name__, reason))
            continue
        target = entry.layer
        if isinstance(module, QuantizedLayer):
            target = type(module)
        chosen.append(_Chosen(name, module, target))
    return chosen, left


class _Caller(NamedTuple):
    """A module that may call functions.

    Attributes:
        name (str): Qualified name in the model.
        module (nn.Module): The module.
        names (tuple[str]): Qualified names of the functions to compress.
        excluded (frozenset[str]): Names of the others.
    """

    name: str
    module: nn.Module
    names: tuple
    excluded: frozenset

    @property
    def prefix(self):
        return _prefix(self.name)


def _prefix(name):
    return f'{name}.' if name else ''


def _choose_functions(model, include, exclude, filter_fn):
    """Find modules that call functions, and functions to compress there.

    Filters see functions as layers of the modules. ``filter_fn``, which takes
    a layer, cannot: with it, functions are those of torch.
    """
    parents = {
        entry.name: default_registry.layers[entry.layer].parent
        for entry in default_registry.functions.values()
        if isinstance(entry, FunctionEntry)
    }
    callers = []
    for name, module in named_modules(model):
        if not calls_functions(module):
            continue
        names, excluded = [], []
        for function, parent in parents.items():
            full = _prefix(name) + function
            # Both are called for every function: filters record matches.
            is_out = exclude.matches_class(full, parent)
            is_in = include is None or include.matches_class(full, parent)
            if is_in and not is_out and filter_fn is None:
                names.append(full)
            else:
                excluded.append(function)
        callers.append(
            _Caller(name, module, tuple(names), frozenset(excluded))
        )
    return callers


def _why_filtered(name, module, include, exclude, filter_fn):
    """Reason why filters exclude a layer, or None."""
    # Both are called for every layer: filters record what they match.
    excluded = exclude.matches(name, module)
    included = include is None or include.matches(name, module)
    if excluded:
        return 'excluded'
    if not included:
        return 'not included'
    if filter_fn is not None and not filter_fn(module, name):
        return 'filter_fn says no'
    return None


def _fuses(level):
    return bool(level.fuse and level.norm is not None and level.mask)


def _coded_relus(plans, level):
    """ReLUs of adapters right behind a convolution."""
    if not _fuses(level) or level.conv is None:
        return []
    return [
        layer
        for plan in plans
        for name, layer in plan.layers.items()
        if name in plan.target.coded_relus
    ]


def _is_lone(fusion):
    """Whether a block is one convolution with its epilogue."""
    (plan, *_) = fusion.runner.plans
    return len(plan.steps) == 1 and plan.is_mergeable


def _set_chains(model, uses_chains):
    for module in model.modules():
        if isinstance(module, Adapter):
            module.__dict__['uses_chains'] = uses_chains


def _replace_shared(model, layers):
    """Replace layers that are shared with other models by twins.

    Returns:
        dict[nn.Module, nn.Module]: Twins by the layers that they replace.
    """
    twins = {layer: alias_of(layer) for layer in layers}
    if twins:
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if child in twins:
                    module._modules[name] = twins[child]
    return twins


def revert_model(model):
    """Revert compressed layers to plain ones, in place.

    Args:
        model (nn.Module): The model.

    Returns:
        list[str]: Qualified names of the layers and of the adapted modules
        that were reverted.
    """
    names = []
    swap = attached_swap(model)
    if swap is not None:
        swap.detach()
    remove_scopes(model)
    undo_segments(model)
    # Lists, since adapters drop their layers.
    for module in list(model.modules()):
        if is_fused(module):
            unfuse(module)
    for name, module in list(named_modules(model)):
        if isinstance(module, Adapter):
            module.revert_()
            names.append(name)
    for name, module in list(named_modules(model)):
        if isinstance(module, QuantizedLayer):
            module.revert_()
            names.append(name)
    return names


def get_precision(model):
    """Get the adaptive precision of a model.

    Args:
        model (nn.Module): A model that was converted at an adaptive level.

    Returns:
        AdaptivePrecision: The object that allocates the bits of the model.

    Raises:
        ValueError: If the model has none, or its parts have several.
    """
    found = find_precisions(model)
    if len(found) != 1:
        raise ValueError(
            'expected a model that one call has converted at an adaptive '
            f'level, got one with {len(found)} of them'
        )
    return found.pop()


def _all_modules(model, plans):
    """All modules of a model, including layers that adapters will add."""
    for name, module in named_modules(model):
        yield name, module
        if module in plans:
            yield from plans[module].named_layers.items()


def _set_scopes(callers, make_settings):
    """Compress functions that modules call, and make entries of the report."""
    prefixes = []
    for caller in callers:
        module = caller.module
        if not caller.names and not caller.name.startswith(tuple(prefixes)):
            continue
        prefixes.append(caller.prefix)
        settings = make_settings(
            caller.name,
            has_parameters=next(module.parameters(), None) is not None,
            excluded=caller.excluded,
            first_only=frozenset(
                part
                for part, layer in module.named_children()
                if isinstance(layer, nn.MultiheadAttention)
                and reads_first_only(type(module), part)
            ),
        )
        source = type(module).__name__
        swaps = not (is_fused(module) or isinstance(module, Adapter))
        set_scope(module, settings, swaps)
        if caller.names:
            yield Scoped(caller.name, source)


def _install(plan):
    """Adapt a module, and make its entry of the report."""
    source = type(plan.module).__name__
    plan.install()
    return Adapted(plan.name, source, plan.target.__name__, tuple(plan.layers))


def find_precisions(model):
    """Adaptive precisions of the layers of a model."""
    return {
        module.quantizer.layer_bits.precision
        for module in model.modules()
        if isinstance(module, QuantizedLayer)
        and module.quantizer.layer_bits is not None
    }


def _make_precision(level, num_samples):
    if not level.adaptive:
        return None
    if level.use_gradient and num_samples is None:
        raise ValueError(
            f'level {level.name} has use_gradient=True and needs num_samples, '
            'the size of the dataset, got None'
        )
    return AdaptivePrecision(
        num_samples if level.use_gradient else None,
        rotated=level.rounding == 'rotated',
    )


def _reads_images(module):
    """Whether a layer is a convolution of as few channels as an image has."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and module.groups == 1
        and module.in_channels <= _MAX_IMAGE_CHANNELS
    )


def _find_fusions(model, level, chosen):
    """Find blocks of a model that a level fuses.

    Layers that the filters exclude take part with their present settings.
    """
    targets = {
        module: type(module)
        for module in model.modules()
        if isinstance(module, QuantizedLayer)
        and (module.quantizer.fused_bits or module.kind == 'mask')
        and not module.quantizer.exact
    }
    fuses = _fuses(level)
    for name, module, target in chosen:
        targets.pop(module, None)
        rule = level.rule_for(name)
        if fuses and (rule is None or rule.bits is not None):
            targets[module] = target
    if not targets:
        return FoundFusions({}, {})
    return find_fusions(model, targets.get)


def _swap(model, level):
    """Start or stop swapping, according to the level."""
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


def _fuse(name, fusion):
    """Fuse a block, and make its entry of the report."""
    source = type(fusion.module).__name__
    fuse(fusion.module, fusion.runner)
    return Fused(name, source, len(fusion.norms), fusion.patterns)


def _make_exact(items, group_size, generator, cache):
    """Make compressed layers within segments compute as torch's."""
    for item in items:
        if isinstance(item.module, QuantizedLayer):
            item.module.quantizer = LayerQuantizer.for_level(
                item.target,
                LEVELS['L0'],
                group_size,
                generator,
                item.module.quantizer.own,
                item.name,
                cache=cache,
            )


def _convert(item, module, quantizer):
    """Convert a layer, and make its entry of the report."""
    source = type(module).__name__
    if isinstance(module, QuantizedLayer):
        module.quantizer = quantizer
    else:
        item.target.convert_(module, quantizer)
    return Converted(
        item.name,
        source,
        item.target.__name__,
        quantizer.bits,
        quantizer.layer_bits is not None,
    )
