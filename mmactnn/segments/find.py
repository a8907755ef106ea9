"""Search for the blocks of a model that pay as segments."""

import collections
from typing import NamedTuple

from torch import nn

from ..modules.class_swap import wrapped_class
from ..modules.naming import named_modules
from .parts import BlockSize

# Containers, whose class says nothing about what they compute.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Share of a block's memory that repeated blocks in containers within must hold
# to become segments in its place.
_MIN_COVERED = 0.5
# How many times as much a block must keep as the segment.
_MIN_GAIN = 2


class FoundSegments(NamedTuple):
    """Result of a search.

    Attributes:
        segments (dict[str, nn.Module]): Blocks to be segments, by qualified
            name.
        refused (dict[str, tuple[nn.Module, str]]): Blocks that hold enough
            but cannot be segments, with the reason, likewise.
        sizes (dict[str, BlockSize]): Sizes of the segments, likewise.
    """

    segments: dict
    refused: dict
    sizes: dict


def find_segments(model, bits_of, why_not, segment_bits):
    """Find the repeated blocks of a model that pay as segments.

    A block is repeated if a module has several children of its class. Of
    repeated blocks within one another the inner ones are taken if they are in
    a container, as the blocks of a stage, and hold most of what the outer one
    keeps, since a segment lives as a whole while it runs again. All blocks of
    a class that is taken somewhere are.

    Args:
        model (nn.Module): The model.
        bits_of (Callable): Maps a layer to the bits an element of its input
            that it keeps otherwise (32 if it keeps that exactly), and to
            those that it also keeps in a segment, for predicates.
        why_not (Callable): Maps the name of a block and the block to the
            reason why it cannot be a segment, or to None.
        segment_bits (float): Bits an element of the input of a segment.

    Returns:
        FoundSegments: The blocks; the model is not changed.
    """
    search = _Search(model, bits_of)
    chosen = search.choose(model)
    classes = {_class(module) for module in chosen}
    found, refused, sizes, inside = {}, {}, {}, set()
    for name, module in named_modules(model):
        if module in inside or _class(module) not in classes:
            continue
        if search.gain(module, segment_bits) < _MIN_GAIN:
            continue
        reason = why_not(name, module)
        if reason is not None:
            refused[name] = module, reason
            continue
        found[name] = module
        sizes[name] = search.size_of(module)
        inside.update(module.modules())
    return FoundSegments(found, refused, sizes)


class _Search:
    """Memory of modules by what their layers keep.

    Args:
        model (nn.Module): The model.
        bits_of (Callable): See :func:`find_segments`.
    """

    def __init__(self, model, bits_of):
        self._kept = {}
        self._stays = {}
        self._lives = {}
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
                own[module] = reads, reads, bits_of(module)
            elif not module._modules:
                # An activation reads what the layer before made.
                own[module] = width, 0, bits_of(module)
        for module in model.modules():
            parts = [part for part in module.modules() if part in own]
            sizes = [(own[part][0], *own[part][2]) for part in parts]
            # Masks hardly count beside exact values.
            self._lives[module] = sum(n for n, kept, _ in sizes if kept > 1)
            self._kept[module] = sum(n * kept for n, kept, _ in sizes)
            self._stays[module] = sum(n * stays for n, _, stays in sizes)
            # The first layer reads the input.
            widths = [own[p][1] for p in parts if own[p][1] and not p._modules]
            self._width[module] = widths[0] if widths else 0

    def gain(self, module, segment_bits):
        """Memory of a module over that of the module as a segment.

        Args:
            module (nn.Module): The module.
            segment_bits (float): Bits an element of the input of a segment.

        Returns:
            float: 0 if it has no parameters.
        """
        width = self._width[module]
        if not width:
            return 0
        return self._kept[module] / (
            width * segment_bits + self._stays[module]
        )

    def size_of(self, module):
        """Size of a block while it runs again.

        Args:
            module (nn.Module): The block.

        Returns:
            BlockSize: The size.
        """
        parts = module.named_modules(remove_duplicate=False)
        return BlockSize(
            self._width[module],
            {name: self._lives[part] for name, part in parts},
        )

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
