"""Codes within graphs: encoding, decoding and packing as nodes.

Values become codes by the package's kernels, as ops of their own, whose
arguments may depend on shapes. Predicates are packed by torch's operations,
which Inductor fuses into the kernels before and behind.
"""

import math
import operator

import torch

from ..ops.quantize import DEFAULT_GROUP_SIZE, dequantize, quantize
from ..ops.random_bits import DrawnBits
from ..random import GOLDEN64, default_generator, mix64
from .values import (
    emit,
    inverse,
    is_symbol,
    is_tensor,
    memory_order,
    numel,
    value,
)

aten = torch.ops.aten

_library = torch.library.Library('mmactnn_graph', 'DEF')
_library.define(
    'draw(Device device) -> Tensor',
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.define(
    'encode(Tensor values, Tensor drawn, int key, int bits, bool rotated) -> '
    '(Tensor codes, Tensor ranges)'
)
_library.define(
    'decode(Tensor codes, Tensor ranges, Tensor drawn, SymInt count, '
    'ScalarType dtype, int key, int bits, str rounding) -> Tensor'
)
_ops = torch.ops.mmactnn_graph


def _draw(device):
    seed, offset, counter = default_generator.next(device)
    # One number stands for both: the keys in graphs are constants.
    start = mix64(seed + mix64(offset + GOLDEN64)) >> 1
    if counter is not None:
        return counter + start
    return torch.full((1,), start, dtype=torch.int64, device=device)


def _encode(values, drawn, key, bits, rotated):
    # As one sample: nothing is decoded in part.
    return quantize(
        values[None],
        bits,
        DEFAULT_GROUP_SIZE,
        seed=key,
        offset_tensor=drawn,
        rotated=rotated,
    )


def _decode(codes, ranges, drawn, count, dtype, key, bits, rounding):
    flat = dequantize(
        codes,
        ranges,
        (1, count),
        (count, 1),
        dtype,
        bits,
        DEFAULT_GROUP_SIZE,
        drawn=DrawnBits.of(rounding, key, 0, drawn),
    )
    return flat[0]


def _fake_draw(device):
    return torch.empty((1,), dtype=torch.int64, device=device)


def _fake_encode(values, drawn, key, bits, rotated):
    count = values.shape[0]
    groups = (count + DEFAULT_GROUP_SIZE - 1) // DEFAULT_GROUP_SIZE
    codes = values.new_empty((1, (count + 7) // 8 * bits), dtype=torch.uint8)
    return codes, values.new_empty((1, groups, 2), dtype=torch.bfloat16)


def _fake_decode(codes, ranges, drawn, count, dtype, *format):
    return codes.new_empty((count,), dtype=dtype)


for _name, _kernel, _fake in (
    ('draw', _draw, _fake_draw),
    ('encode', _encode, _fake_encode),
    ('decode', _decode, _fake_decode),
):
    _library.impl(_name, _kernel, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'mmactnn_graph::{_name}', _fake, lib=_library)


class Codec:
    """Emitter of the nodes that encode, decode and pack, for one graph.

    Args:
        graph (fx.Graph): The joint graph.
        rounding (str): See :class:`mmactnn.Compression`.
        low_dtype (torch.dtype, optional): Dtype of 16 bits that the model
            computes in. Values in float32 that are kept at few bits are
            rounded to it before they become codes, and decoded to it, which
            halves the traffic; None keeps them in float32.
    """

    def __init__(self, graph, rounding, low_dtype=None):
        self._graph = graph
        self._rounding = rounding
        self._low_dtype = low_dtype
        self._drawn = {}
        self._sizes = {}
        self._last = {}
        self._num_payloads = 0
        self._first = next(n for n in graph.nodes if n.op != 'placeholder')

    def encode(self, node, bits, centred=False):
        """Insert the encoding of a value behind it.

        Args:
            node (fx.Node): The value, dense.
            bits (int): Bits a code.
            centred (bool, optional): Whether the means of channels, which
                are innermost in memory, are kept apart in float32. Defaults
                to False.

        Returns:
            Payload: The payload.
        """
        device = value(node).device
        drawn = self._draw_for(device)
        self._num_payloads += 1
        key = mix64(self._num_payloads * GOLDEN64) >> 1
        tensor = value(node)
        order = memory_order(tensor)
        count = numel(tensor)
        dtype = tensor.dtype
        if (
            dtype is torch.float32
            and self._low_dtype is not None
            and bits <= 4
        ):
            dtype = self._low_dtype
        with self._after(node, drawn) as place:
            sizes = self._sizes_of(node)
            means = None
            flat = _permute(self._graph, node, order)
            if centred:
                means, flat = self._centre(flat)
            if value(flat).dtype != dtype:
                flat = emit(
                    self._graph,
                    torch.ops.prims.convert_element_type.default,
                    flat,
                    dtype,
                )
            flat = emit(self._graph, aten.reshape.default, flat, [-1])
            rotated = self._rounding == 'rotated' and (
                count % DEFAULT_GROUP_SIZE == 0
            )
            pair = emit(
                self._graph,
                _ops.encode.default,
                flat,
                drawn,
                key,
                bits,
                rotated,
            )
            codes = emit(self._graph, operator.getitem, pair, 0)
            ranges = emit(self._graph, operator.getitem, pair, 1)
            place.last = ranges
            total = self._product(sizes)
            rounding = self._rounding
            if rounding == 'rotated' and not rotated:
                rounding = 'dither'
            return Payload(
                self,
                (codes, ranges, drawn),
                (total, dtype, key, bits, rounding),
                means,
                [sizes[d] for d in order],
                order,
                tensor.dtype,
            )

    def pack(self, node):
        """Insert the packing of a predicate behind it.

        Args:
            node (fx.Node): Bools, dense.

        Returns:
            PackedBits: The payload.
        """
        graph = self._graph
        order = memory_order(value(node))
        with self._after(node) as place:
            sizes = self._sizes_of(node)
            total = self._product(sizes)
            flat = _permute(graph, node, order)
            flat = emit(graph, aten.reshape.default, flat, [-1])
            if isinstance(total, int):
                padding = -total % 8
            else:
                padding = emit(graph, operator.mod, total, 8)
                padding = emit(graph, operator.sub, 8, padding)
            if not isinstance(padding, int) or padding:
                flat = emit(
                    graph, aten.constant_pad_nd.default, flat, [0, padding]
                )
            rows = emit(graph, aten.reshape.default, flat, [8, -1])
            cast = torch.ops.prims.convert_element_type.default
            packed = None
            for i in range(8):
                bit = emit(graph, aten.select.int, rows, 0, i)
                bit = emit(graph, cast, bit, torch.uint8)
                if i:
                    bit = emit(
                        graph, aten.bitwise_left_shift.Tensor_Scalar, bit, i
                    )
                    bit = emit(graph, aten.bitwise_or.Tensor, packed, bit)
                packed = bit
            place.last = packed
            return PackedBits(
                self, packed, total, [sizes[d] for d in order], order
            )

    def _centre(self, inner):
        """Means of the innermost dimension's elements, and the rest."""
        graph = self._graph
        dims = list(range(value(inner).dim() - 1))
        means = emit(
            graph, aten.mean.dim, inner, dims, True, dtype=torch.float32
        )
        # Of channels with infinities or NaN there are no means.
        zero = emit(graph, aten.mul.Tensor, means, 0.0)
        finite = emit(graph, aten.eq.Scalar, zero, 0.0)
        nothing = emit(
            graph,
            aten.full.default,
            [],
            0.0,
            dtype=torch.float32,
            device=value(inner).device,
        )
        means = emit(graph, aten.where.self, finite, means, nothing)
        return means, emit(graph, aten.sub.Tensor, inner, means)

    def _draw_for(self, device):
        """The node that draws a device's random number, once a pass."""
        if device not in self._drawn:
            with self._graph.inserting_before(self._first):
                self._drawn[device] = emit(
                    self._graph, _ops.draw.default, device
                )
        return self._drawn[device]

    def _sizes_of(self, node):
        """Sizes of a value, as numbers or as nodes that compute them."""
        if node not in self._sizes:
            self._sizes[node] = [
                size
                if isinstance(size, int)
                else emit(self._graph, aten.sym_size.int, node, d)
                for d, size in enumerate(value(node).shape)
            ]
        return self._sizes[node]

    def _product(self, sizes):
        total = math.prod(size for size in sizes if isinstance(size, int))
        for size in sizes:
            if not isinstance(size, int):
                total = emit(self._graph, operator.mul, size, total)
        return total

    def _after(self, *nodes):
        """Context to insert behind nodes, and what was inserted there."""
        return _Place(self._graph, self._last, nodes, self._first)


class _Place:
    """Insertion point behind values, in the order of the insertions."""

    def __init__(self, graph, last, nodes, first):
        self._last = last
        self._key = nodes[0]
        self.last = None
        at = last.get(nodes[0], nodes[0])
        if at.op == 'placeholder':
            context = graph.inserting_before(first)
        else:
            context = graph.inserting_before(at.next)
        self._context = context

    def __enter__(self):
        self._context.__enter__()
        return self

    def __exit__(self, *error):
        if self.last is not None:
            self._last[self._key] = self.last
        return self._context.__exit__(*error)


class Payload:
    """Codes of a value, as nodes.

    Args:
        codec (Codec): The emitter.
        kept (tuple[fx.Node]): Codes, ranges and random number.
        format (tuple): Further arguments of the op that decodes.
        means (fx.Node, optional): Means of channels.
        sizes (list): Sizes in memory order.
        order (list[int]): Dimensions in memory order.
        dtype (torch.dtype): Dtype of the value.
    """

    def __init__(self, codec, kept, format, means, sizes, order, dtype):
        self._codec = codec
        self._kept, self._format, self._means = kept, format, means
        self._sizes, self._order, self._dtype = sizes, order, dtype

    @property
    def kept(self):
        """tuple[fx.Node]: What is kept for this value alone."""
        codes, ranges, _ = self._kept
        extra = () if self._means is None else (self._means,)
        return (codes, ranges, *extra)

    @property
    def shared(self):
        """tuple[fx.Node]: What is kept for all values together."""
        return self._kept[2:]

    def decode(self):
        """Insert the decoding at the graph's insertion point.

        Returns:
            fx.Node: The decoded value.
        """
        graph = self._codec._graph
        node = emit(graph, _ops.decode.default, *self._kept, *self._format)
        node = emit(graph, aten.reshape.default, node, self._sizes)
        if self._means is not None:
            node = emit(graph, aten.add.Tensor, node, self._means)
        if value(node).dtype != self._dtype:
            cast = torch.ops.prims.convert_element_type.default
            node = emit(graph, cast, node, self._dtype)
        return _permute(graph, node, inverse(self._order))


class PackedBits:
    """A predicate at a bit an element, as a node.

    Args:
        codec (Codec): The emitter.
        packed (fx.Node): Bit i of byte j is element ``i * bytes + j`` in
            memory order.
        count (int | fx.Node): Number of elements.
        sizes (list): Sizes in memory order.
        order (list[int]): Dimensions in memory order.
    """

    def __init__(self, codec, packed, count, sizes, order):
        self._codec = codec
        self._packed, self._count = packed, count
        self._sizes, self._order = sizes, order

    @property
    def kept(self):
        """tuple[fx.Node]: See :class:`Payload`."""
        return (self._packed,)

    @property
    def shared(self):
        """tuple[fx.Node]: See :class:`Payload`."""
        return ()

    def decode(self):
        """See :class:`Payload`."""
        graph = self._codec._graph
        packed = self._packed
        shifts = emit(
            graph,
            torch.ops.prims.iota.default,
            8,
            start=0,
            step=1,
            dtype=torch.uint8,
            device=value(packed).device,
            requires_grad=False,
        )
        shifts = emit(graph, aten.unsqueeze.default, shifts, 1)
        rows = emit(graph, aten.unsqueeze.default, packed, 0)
        bits = emit(graph, aten.bitwise_right_shift.Tensor, rows, shifts)
        bits = emit(graph, aten.bitwise_and.Scalar, bits, 1)
        bits = emit(
            graph,
            torch.ops.prims.convert_element_type.default,
            bits,
            torch.bool,
        )
        flat = emit(graph, aten.reshape.default, bits, [-1])
        if not isinstance(self._count, int) or self._count % 8:
            flat = emit(graph, aten.slice.Tensor, flat, 0, 0, self._count)
        flat = emit(graph, aten.reshape.default, flat, self._sizes)
        return _permute(graph, flat, inverse(self._order))


def _permute(graph, node, order):
    if order == sorted(order):
        return node
    return emit(graph, aten.permute.default, node, order)


def low_dtype_of(graph):
    """Dtype of 16 bits that a graph computes in.

    Args:
        graph (fx.Graph): Any graph.

    Returns:
        torch.dtype, optional: None if there is none, or both.
    """
    found = {
        value(node).dtype
        for node in graph.nodes
        if is_tensor(node) and not is_symbol(node)
    } & {torch.float16, torch.bfloat16}
    return found.pop() if len(found) == 1 else None
