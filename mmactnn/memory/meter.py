"""Meter of the memory that a forward pass keeps for the backward pass."""

import collections
import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..codes.hooks import top_hooks
from ..codes.units import MIB
from ..functional import settings_of
from ..layers import QuantizedLayer
from ..modules.naming import gathering_modules
from ..offload import attached_swap
from ..registry import default_registry


class Counted(NamedTuple):
    """Bytes that a place in the program keeps.

    Attributes:
        exact (int): Bytes that torch would have kept without compression.
        saved (int): Bytes that are kept.
    """

    exact: int
    saved: int


class Amounts(NamedTuple):
    """Counts of a meter, for another one.

    Attributes:
        sizes (dict[tuple[str, bool], int]): Bytes by count and by whether a
            compressed layer keeps them or replaces them.
        shared (tuple[tuple[str, bool, int]]): Tensors that the other meter
            may count as well: count, likewise, and index.
    """

    sizes: dict
    shared: tuple


class ActivationMeter:
    """Meter of the memory that one forward pass keeps.

    A storage counts once, however many tensors share it, and with its full
    size. Parameters and buffers of the model do not count, nor do tensors
    that a backward pass recomputes (checkpointing).

    Args:
        model (nn.Module): The model that is measured.
        locate (Callable, optional): Called without arguments whenever a
            tensor is kept; returns its place, a hashable object, for
            :meth:`by_place`. Defaults to one place for all.
    """

    def __init__(self, model, locate=None):
        self._locate = locate or (lambda: None)
        # Its hooks hide this object's, and report the tensors that they get.
        self.swap = attached_swap(model)
        self._own = _Storages()
        self.own(model)
        self._saved = _Storages()
        self._swapped = _Storages()
        self._exact = _Storages()
        self._layers_saved = _Storages()
        self._layers_exact = _Storages()
        # Maps the storage of a payload's first tensor to the storages that
        # torch would have kept in its place.
        self._replaced = {}
        self._payloads = _Storages()

    @property
    def meter(self):
        """ActivationMeter: This object; see ``codes.hooks.meter_in_force``."""
        return self

    @property
    def saved_bytes(self):
        """int: Bytes kept by all operations of the model."""
        return self._saved.nbytes

    @property
    def swapped_bytes(self):
        """int: Bytes of ``saved_bytes`` that are on the host."""
        return self._swapped.nbytes

    @property
    def exact_bytes(self):
        """int: Bytes that torch would have kept without compression."""
        return self._exact.nbytes

    @property
    def layers_saved_bytes(self):
        """int: Bytes of codes, ranges and masks."""
        return self._layers_saved.nbytes

    @property
    def layers_exact_bytes(self):
        """int: Bytes that torch would have kept in their place."""
        return self._layers_exact.nbytes

    @property
    def saved_mib(self):
        """float: ``saved_bytes`` in MiB (2^20 bytes)."""
        return self.saved_bytes / MIB

    @property
    def exact_mib(self):
        """float: ``exact_bytes`` in MiB (2^20 bytes)."""
        return self.exact_bytes / MIB

    @property
    def ratio(self):
        """float: ``exact_bytes`` over ``saved_bytes``."""
        return self.exact_bytes / self.saved_bytes if self.saved_bytes else 1.0

    @property
    def layers_ratio(self):
        """float: ``layers_exact_bytes`` over ``layers_saved_bytes``."""
        saved = self.layers_saved_bytes
        return self.layers_exact_bytes / saved if saved else 1.0

    def by_place(self):
        """Bytes by place.

        A storage belongs to the place that kept it first, so that places add
        up to ``exact_bytes`` and ``saved_bytes``.

        Returns:
            dict[tuple[Hashable, bool], Counted]: Bytes by place and by
            whether a compressed layer replaces tensors there.
        """
        exact, saved = self._exact.by_origin(), self._saved.by_origin()
        return {
            origin: Counted(exact[origin], saved[origin])
            for origin in dict.fromkeys([*exact, *saved])
        }

    def amounts(self, results=()):
        """Take the counts, for :meth:`add` of another meter.

        Args:
            results (Sequence[Tensor], optional): Tensors whose storages are
                counted once in both together.

        Returns:
            Amounts: The counts.
        """
        sizes, shared = collections.Counter(), []
        for name, storages in self._counts.items():
            for key, (_, nbytes, origin) in storages.items():
                compressed = origin is None or origin[1]
                index = _index_of(results, key)
                if index is None:
                    sizes[name, compressed] += nbytes
                else:
                    shared.append((name, compressed, index))
        return Amounts(dict(sizes), tuple(shared))

    def add(self, amounts, results=()):
        """Count what another meter has counted before.

        Args:
            amounts (Amounts): Its counts, such as those of a captured graph
                that is replayed.
            results (Sequence[Tensor], optional): See :meth:`amounts`.
        """
        place = self._locate()
        for (name, compressed), nbytes in amounts.sizes.items():
            self._counts[name].add_bytes(nbytes, (place, compressed))
        for name, compressed, index in amounts.shared:
            self._counts[name].add(results[index], (place, compressed))

    @property
    def _counts(self):
        return dict(
            exact=self._exact,
            saved=self._saved,
            layers_exact=self._layers_exact,
            layers_saved=self._layers_saved,
        )

    def own(self, module):
        """Exclude the parameters and buffers of a module from the count.

        Args:
            module (nn.Module): The model, or a part that has gathered its
                parameters.
        """
        for tensor in (*module.parameters(), *module.buffers()):
            self._own.add(tensor)

    def replace(self, kept, exact):
        """Count tensors that a compressed layer replaces.

        They count once autograd really saves the layer's tensors, which it
        does not inside of a checkpointed block.

        Args:
            kept (tuple[Tensor]): Tensors that the layer saves.
            exact (tuple[Tensor]): Tensors that torch would have saved in
                their place.
        """
        if _in_backward() or not self._is_listening():
            return
        replaced = _Storages()
        if kept:
            for tensor in kept:
                self._payloads.add(tensor)
            # Several layers may share a payload, which is saved once.
            key = kept[0].untyped_storage()._cdata
            replaced = self._replaced.setdefault(key, replaced)
        origin = self._locate(), True
        for tensor in exact:
            if not self._is_own(tensor):
                replaced.add(tensor, origin)
        if not kept:
            self._count_replaced(replaced)

    def count_segment(self, kept):
        """Count a segment, which keeps payloads of its inputs alone.

        Args:
            kept (tuple[Tensor]): Tensors of the payloads, before they are
                saved.

        Returns:
            SegmentCount: Counter of the tensors that torch would have saved.
        """
        self.replace(kept, ())
        return SegmentCount(self)

    def observe(self, tensor, swapped):
        """Count a tensor that autograd saves.

        Args:
            tensor (Tensor): The tensor.
            swapped (bool): Whether it is moved to the host.
        """
        if _in_backward() or self._is_own(tensor):
            return
        self._count(tensor)
        if swapped:
            self._swapped.add(tensor)

    def pack(self, tensor):
        """Hook for every tensor that autograd saves; counts it."""
        self.observe(tensor, swapped=False)
        # Detached: an output that its own node saves would own that node, and
        # without a backward pass neither would be freed.
        return tensor.detach()

    # See mmactnn.codes.hooks.
    pack.keeps_tensors = True

    def _count(self, tensor):
        compressed = tensor in self._payloads
        origin = self._locate(), compressed
        self._saved.add(tensor, origin)
        if compressed:
            self._layers_saved.add(tensor)
            key = tensor.untyped_storage()._cdata
            if key in self._replaced:
                self._count_replaced(self._replaced.pop(key))
        else:
            self._exact.add(tensor, origin)

    def _count_replaced(self, storages):
        self._exact.update(storages)
        self._layers_exact.update(storages)

    def _is_listening(self):
        # Checkpointing puts hooks of its own on top of ours. A layer that
        # keeps nothing would count there otherwise, as no pack() follows.
        if self.swap is not None and self.swap.is_on_top():
            return True
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return hooks is not None and hooks[0] == self.pack

    def _is_own(self, tensor):
        return tensor in self._own


class SegmentCount:
    """Counter of the tensors that torch would save in a segment.

    Args:
        meter (ActivationMeter): The meter.
    """

    def __init__(self, meter):
        self._meter = meter
        self._storages = _Storages()

    @contextlib.contextmanager
    def listening(self):
        """Listen to the hooks in force, those of checkpointing, as context."""
        pack, unpack = top_hooks(True)

        def listen(tensor):
            meter = self._meter
            if not meter._is_own(tensor):
                self._storages.add(tensor, (meter._locate(), True))
            return pack(tensor)

        with saved_tensors_hooks(listen, unpack):
            yield

    def keep(self, tensors):
        """Count tensors that the segment keeps beside those autograd saves.

        Args:
            tensors (Iterable[Tensor]): Such as masks.
        """
        meter = self._meter
        for tensor in tensors:
            meter._saved.add(tensor, (meter._locate(), True))
            meter._layers_saved.add(tensor)

    def finish(self):
        """Count the tensors, at the end of the segment."""
        self._meter._count_replaced(self._storages)


class LayerMeter(NamedTuple):
    """Connection of a layer to a meter.

    Attributes:
        meter (ActivationMeter): The meter.
        rule (Callable): Maps a call to the tensors that torch would have
            kept, see :func:`mmactnn.registry.register_layer`.
    """

    meter: ActivationMeter
    rule: Callable

    def record(self, kept, call, also=()):
        """Count a call; see ``LayerQuantizer.record``."""
        exact = (t for t in self.rule(call) if t is not None)
        self.meter.replace(kept, (*exact, *also))

    def observe(self, tensors):
        """Count tensors that autograd keeps unseen by the meter's hooks.

        Args:
            tensors (Sequence[Tensor]): The tensors.
        """
        for tensor in tensors:
            self.meter.observe(tensor, swapped=False)


class _Storages:
    """Set of storages with their sizes and the places that kept them first.

    Weak references do not keep memory alive, but prevent that a new storage
    gets the identity of a freed one.
    """

    def __init__(self):
        self._entries = {}
        self.nbytes = 0

    def __contains__(self, tensor):
        return tensor.untyped_storage()._cdata in self._entries

    def add(self, tensor, origin=None):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._entries:
            self._insert(
                storage._cdata,
                (StorageWeakRef(storage), storage.nbytes(), origin),
            )

    def items(self):
        return self._entries.items()

    def add_bytes(self, nbytes, origin=None):
        # Of no storage that could be counted again.
        self._insert(object(), (None, nbytes, origin))

    def update(self, other):
        for key, entry in other._entries.items():
            if key not in self._entries:
                self._insert(key, entry)

    def by_origin(self):
        sizes = collections.Counter()
        for _, nbytes, origin in self._entries.values():
            sizes[origin] += nbytes
        return sizes

    def _insert(self, key, entry):
        self._entries[key] = entry
        self.nbytes += entry[1]


def _index_of(tensors, key):
    """Index of the tensor with a storage, or None."""
    for index, tensor in enumerate(tensors):
        if tensor.untyped_storage()._cdata == key:
            return index
    return None


def _in_backward():
    return torch._C._current_graph_task_id() != -1


def _identity(tensor):
    return tensor


@contextlib.contextmanager
def measure_activations(model, locate=None):
    """Measure the memory that forward passes in a context keep.

    Costs host time only: no synchronisation with the device.

    Args:
        model (nn.Module): The model, converted or not.
        locate (Callable, optional): Returns the place of a tensor; see
            :class:`ActivationMeter` and :class:`mmactnn.memory.Locator`.

    Yields:
        ActivationMeter: The meter, which counts as the model runs.

    Examples:
        >>> with mmactnn.measure_activations(model) as meter:
        ...     loss = model(images).sum()
        >>> print(f'{meter.saved_mib:.1f} of {meter.exact_mib:.1f} MiB')
    """
    meter = ActivationMeter(model, locate)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    # Those of an outer context, such as that of a training step in which a
    # part is captured.
    outer_meters = [layer.quantizer.meter for layer in layers]
    for layer in layers:
        entry = default_registry.entry_of(type(layer))
        layer.quantizer.meter = LayerMeter(meter, entry.saved_by_torch)
    functions = list(filter(None, map(settings_of, model.modules())))
    outer_makers = [settings.make_meter for settings in functions]
    for settings in functions:
        settings.make_meter = functools.partial(LayerMeter, meter)
    swap = meter.swap
    if swap is not None:
        swap.observer = meter.observe
    gathering = [
        module.register_forward_pre_hook(lambda part, args: meter.own(part))
        for module in gathering_modules(model)
    ]
    try:
        with saved_tensors_hooks(meter.pack, _identity):
            yield meter
    finally:
        if swap is not None:
            swap.observer = None
        for layer, outer in zip(layers, outer_meters):
            layer.quantizer.meter = outer
        for settings, make_meter in zip(functions, outer_makers):
            settings.make_meter = make_meter
        for hook in gathering:
            hook.remove()
