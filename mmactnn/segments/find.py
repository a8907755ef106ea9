"""Search for the blocks of a model that pay as segments."""

import collections

from torch import nn

from ..modules.class_swap import wrapped_class
from ..modules.naming import named_modules

# Containers, whose class says nothing about what they compute.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Share of a block's memory that repeated blocks in containers within must hold
# to become segments in its place.
_MIN_COVERED = 0.5
# How many times the codes of its input a segment must save, at least.
_MIN_GAIN = 2


def find_segments(model, bits_of, why_not, segment_bits):
    """Find the repeated blocks of a model that pay as segments.

    A block is repeated if a module has several children of its class. Of
    repeated blocks within one another the inner ones are taken if they are in
    a container, as the blocks of a stage, and hold most of what the outer one
    keeps, since a segment lives as a whole while it runs again. All blocks of
    a class that is taken somewhere are.

    Args:
        model (nn.Module): The model.
        bits_of (Callable): Maps a layer to the bits an element of the input
            that it keeps otherwise; 32 if it keeps that exactly.
        why_not (Callable): Maps the name of a block and the block to the
            reason why it cannot be a segment, or to None.
        segment_bits (float): Bits an element of the input of a segment.

    Returns:
        tuple[dict[str, nn.Module], dict[str, tuple[nn.Module, str]]]:
        Segments, and blocks that hold enough but cannot be segments, with the
        reason, by qualified name.
    """
    search = _Search(model, bits_of)
    chosen = search.choose(model)
    classes = {_class(module) for module in chosen}
    found, refused, inside = {}, {}, set()
    for name, module in named_modules(model):
        if module in inside or _class(module) not in classes:
            continue
        if search.gain(module) < _MIN_GAIN * segment_bits:
            continue
        reason = why_not(name, module)
        if reason is not None:
            refused[name] = module, reason
            continue
        found[name] = module
        inside.update(module.modules())
    return found, refused


class _Search:
    """Memory of modules by what their layers keep.

    Args:
        model (nn.Module): The model.
        bits_of (Callable): See :func:`find_segments`.
    """

    def __init__(self, model, bits_of):
        self._kept = {}
        self._width = {}
        self._estimate(model, bits_of)

    def _estimate(self, model, bits_of):
        """Bits that modules keep for one element of one channel."""
        width = 0
        own = {}
        for module in model.modules():
            parameters = [
                p for p in module._parameters.values() if p is not None
            ]
            if parameters:
                reads, width = _widths(module, parameters[0])
                own[module] = reads * bits_of(module), reads
            elif not module._modules:
                # An activation reads what the layer before made.
                own[module] = width * bits_of(module), 0
        for module in model.modules():
            parts = [part for part in module.modules() if part in own]
            self._kept[module] = sum(own[part][0] for part in parts)
            # The first layer reads the input.
            widths = [own[p][1] for p in parts if own[p][1] and not p._modules]
            self._width[module] = widths[0] if widths else 0

    def gain(self, module):
        """Bits kept within a module, an element of its input.

        Args:
            module (nn.Module): The module.

        Returns:
            float: 0 if it has no parameters.
        """
        width = self._width[module]
        return self._kept[module] / width if width else 0

    def choose(self, module):
        """Choose repeated blocks within a module.

        Args:
            module (nn.Module): The module.

        Returns:
            list[nn.Module]: The blocks; none is part of another one.
        """
        return [block for block, _ in self._choose(module)]

    def _choose(self, module):
        """As :meth:`choose`, each with whether it is in a container."""
        children = list(module.children())
        counts = collections.Counter(map(_class, children))
        contained = isinstance(module, _CONTAINERS)
        chosen = []
        for child in children:
            inner = self._choose(child)
            is_block = (
                counts[_class(child)] > 1
                and not isinstance(child, _CONTAINERS)
                and child._modules
            )
            if is_block:
                covered = sum(self._kept[b] for b, c in inner if c)
                if covered < _MIN_COVERED * self._kept[child]:
                    inner = [(child, contained)]
            chosen += inner
        return chosen


def _class(module):
    """Class of a module without what torch derives from it."""
    return wrapped_class(type(module))


def _widths(module, parameter):
    """Channels that a module with parameters reads, and makes."""
    shape = parameter.shape
    if parameter.dim() < 2:
        channels = parameter.numel()
        return channels, channels
    groups = getattr(module, 'groups', 1)
    if getattr(module, 'transposed', False):
        return shape[0], shape[1] * groups
    return shape[1] * groups, shape[0]
