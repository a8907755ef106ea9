"""Rewriting of a joint graph, so that gradients read what is kept."""

import torch

from .codec import Codec, low_dtype_of
from .cut import can_pack
from .demands import Copy
from .values import is_tensor, value


class Rewriter:
    """Inserts encoding and decoding into a joint graph.

    Args:
        cut (Cut): What is kept.
        bits (dict[fx.Node, int]): Bits of the coded values.
        centred (set[fx.Node]): Coded values whose means of channels are kept
            apart.
        rounding (str): See :class:`mmactnn.Compression`.

    Attributes:
        payloads (dict[fx.Node, Payload | PackedBits]): By value.
    """

    def __init__(self, cut, bits, centred, rounding):
        self._cut = cut
        self._graph = cut.joint.graph
        codec = Codec(self._graph, rounding, low_dtype_of(self._graph))
        self.payloads = {}
        for node in list(self._graph.nodes):
            if node in bits:
                self.payloads[node] = codec.encode(
                    node, bits[node], node in centred
                )
            elif node in cut.exact and _is_predicate(node):
                self.payloads[node] = codec.pack(node)
        self._copies = {}

    def rewrite(self, demands):
        """Replace the values that gradients read.

        Args:
            demands (list[Demand]): All demands.
        """
        for user, position, node, copy, _ in demands:
            new = self._get(node, self._cut.resolve(node, copy), user)
            if new is node:
                continue

            def replaced(n, node=node, new=new):
                return new if n is node else n

            if position < 0:
                user.kwargs = _map(user.kwargs, replaced)
            else:
                arguments = list(user.args)
                arguments[position] = _map(arguments[position], replaced)
                user.args = tuple(arguments)
        self._graph.eliminate_dead_code()
        self._graph.lint()

    def _get(self, node, copy, before):
        """The copy of a value, computed no later than before a node."""
        stack = [(node, copy)]
        while stack:
            key = stack[-1]
            if key in self._copies:
                stack.pop()
                continue
            inputs = self._inputs(*key)
            missing = [i for i in inputs.items() if i not in self._copies]
            if missing:
                stack += missing
                continue
            with self._graph.inserting_before(before):
                self._copies[key] = self._make(*key, inputs)
            stack.pop()
        return self._copies[node, copy]

    def _inputs(self, node, copy):
        if self._cut.is_kept(node, copy) or self._is_given(node, copy):
            return {}
        return self._cut.inputs(node, copy)

    def _is_given(self, node, copy):
        """Whether a value is what it is, in both passes."""
        return node in self._cut.joint.constants and copy is Copy.EXACT

    def _make(self, node, copy, inputs):
        if self._cut.is_kept(node, copy):
            payload = self.payloads.get(node)
            kept_exactly = copy is Copy.EXACT and not _is_predicate(node)
            if payload is None or kept_exactly:
                return node
            return payload.decode()
        if self._is_given(node, copy):
            return node
        new = {n: self._copies[n, c] for n, c in inputs.items()}
        if copy is not Copy.REPLAYED and all(new[n] is n for n in new):
            return node
        made = self._graph.node_copy(node, new.__getitem__)
        made.meta = {
            k: v for k, v in node.meta.items() if k in ('val', 'tensor_meta')
        }
        return made


def _is_predicate(node):
    return (
        is_tensor(node) and value(node).dtype is torch.bool and can_pack(node)
    )


def _map(argument, function):
    return torch.fx.node.map_arg(argument, function)
