"""Minimum cut: which values are kept, as they are or as codes.

The network holds up to three copies of each value of the forward pass. An
exact copy is computed again from exact inputs. A coded one is computed again,
by affine operations alone, from coded inputs. A replayed one comes from coded
operands of attention. A copy that is kept costs its bytes. The cut between
what must not be computed again and what the backward pass reads is the
cheapest set to keep.
"""

import math

import torch

from .classes import VIEWS, packet
from .demands import Copy, Role
from .joint import must_recompute, must_save
from .values import is_dense, is_tensor, nbytes, numel, value

aten = torch.ops.aten

# Ranges of a group, as bits an element.
_RANGE_BITS = 32 / 256
_SMALLEST_MASK = 1024
_FARTHEST = 100
# Prefers values close to their use, at equal bytes.
_PER_STEP = 1e-3
_PER_VIEW = 2e-3


class Cut:
    """Solution for one joint graph.

    Args:
        joint (Joint): The graph.
        demands (list[Demand]): Of its backward pass.
        replays (Replays): Its attention.
        bits_of (Callable): Bits of a role.
        forced (set[fx.Node]): Values that must not be kept as codes.

    Attributes:
        coded (set[fx.Node]): Values to keep as codes.
        exact (set[fx.Node]): Values to keep as they are.
        copies (int): Copies in the network.
    """

    def __init__(self, joint, demands, replays, bits_of, forced=frozenset()):
        self.joint = joint
        self.replays = replays
        self._bits_of = bits_of
        # A value that is needed exactly anyway serves all.
        self._single = set(forced) | {
            d.node
            for d in demands
            if d.copy is Copy.EXACT and joint.is_large(d.node)
        }
        self._distance = _distances(joint)
        self._bits = {}
        self.coded, self.exact = set(), set()
        self.copies = 0
        self._solve(demands)

    def resolve(self, node, copy):
        """Copy that stands for a demanded one.

        Args:
            node (fx.Node): The value.
            copy (Copy): What is demanded.

        Returns:
            Copy: ``EXACT`` where an exact copy serves all demands.
        """
        if copy is Copy.CODED and (
            node in self._single
            or node in self.exact
            or self.joint.is_cheap(node)
        ):
            return Copy.EXACT
        return copy

    def inputs(self, node, copy):
        """Copies that a copy is computed from.

        Args:
            node (fx.Node): The value.
            copy (Copy): The copy.

        Returns:
            dict[fx.Node, Copy]: Of all inputs.
        """
        if copy is Copy.REPLAYED:
            return {
                n: self.resolve(n, self._copy_for_replay(n))
                for n in node.all_input_nodes
            }
        affine = None
        if copy is Copy.CODED:
            affine = self.joint.affine_inputs(node)
        return {
            n: self.resolve(
                n, Copy.CODED if affine and affine[n] else Copy.EXACT
            )
            for n in node.all_input_nodes
        }

    def is_kept(self, node, copy):
        """Whether a copy is not computed again."""
        if copy is Copy.CODED:
            return node in self.coded
        return copy is Copy.EXACT and (
            node in self.exact or node.op == 'placeholder'
        )

    def uses_of_payloads(self, demands):
        """Demands that each payload serves.

        Args:
            demands (list[Demand]): All demands.

        Returns:
            dict[fx.Node, list[Demand]]: By payload, in the order of demands.
        """
        uses = {node: [] for node in self.coded}
        for demand in demands:
            for node in self._sources(demand.node, demand.copy):
                uses[node].append(demand)
        return uses

    def _sources(self, node, copy):
        found, seen = [], set()
        todo = [(node, self.resolve(node, copy))]
        while todo:
            key = todo.pop()
            if key in seen:
                continue
            seen.add(key)
            if self.is_kept(*key):
                if key[1] is Copy.CODED:
                    found.append(key[0])
                continue
            todo += self.inputs(*key).items()
        return found

    def _copy_for_replay(self, node):
        if node in self.replays.nodes:
            return Copy.REPLAYED
        if node in self.replays.operands:
            return Copy.CODED
        return Copy.EXACT

    def _solve(self, demands):
        import networkx as nx

        network = nx.DiGraph()
        # What depends on parameters alone is computed from them.
        demands = [d for d in demands if d.node not in self.joint.constants]
        ends = {(d.node, self.resolve(d.node, d.copy)): None for d in demands}
        keys = self._reachable(demands)
        self.copies = len(keys)
        for key in ends:
            network.add_edge((key, 'out'), 'sink')
        for key, inputs in keys.items():
            cost = self._cost(*key)
            _connect(network, (key, 'in'), (key, 'out'), cost)
            if inputs is None:
                network.add_edge('source', (key, 'in'))
                continue
            for item in inputs.items():
                if item not in keys:
                    continue
                network.add_edge((item, 'out'), (key, 'in'))
        if 'source' not in network or not ends:
            return
        _, (before, _) = nx.minimum_cut(
            network,
            'source',
            'sink',
            # The fastest one here, by far: paths are short.
            flow_func=nx.algorithms.flow.boykov_kolmogorov,
        )
        for node, copy in keys:
            key = node, copy
            if (key, 'in') in before and (key, 'out') not in before:
                kept = self.coded if copy is Copy.CODED else self.exact
                kept.add(node)
        self.coded -= self.exact

    def _reachable(self, demands):
        """Copies that may be needed: their inputs, or None.

        Bits of a payload follow from the demands that it may serve.
        """
        keys, todo = {}, []
        for demand in demands:
            role = demand.role
            bits = (role and self._bits_of(role)) or 0
            todo.append((demand.node, demand.copy, bits))
        constants = self.joint.constants
        while todo:
            node, copy, bits = todo.pop()
            key = node, self.resolve(node, copy)
            known = self._bits.get(key, -1)
            if known >= bits:
                continue
            self._bits[key] = bits
            if key not in keys:
                keys[key] = self._inputs_or_none(*key)
            for n, needed in (keys[key] or {}).items():
                if needed is Copy.CODED and key[1] is Copy.REPLAYED:
                    bits = max(bits, self._bits_of(Role.ATTENTION))
                if n not in constants:
                    todo.append((n, needed, bits))
        return keys

    def _inputs_or_none(self, node, copy):
        joint = self.joint
        if copy is not Copy.REPLAYED and not joint.is_recomputable(node):
            return None
        if copy is Copy.EXACT and must_save(node):
            return None
        return self.inputs(node, copy)

    def _cost(self, node, copy):
        if copy is Copy.REPLAYED or must_recompute(node):
            return math.inf
        if not is_tensor(node):
            several = isinstance(value(node), (tuple, list))
            return math.inf if several else 8.0
        steps = min(self._distance.get(node, _FARTHEST), _FARTHEST)
        factor = 1 + _PER_STEP * steps
        held = value(node)
        if copy is Copy.EXACT:
            if held.dtype is torch.bool and can_pack(node):
                return numel(held) / 8 * factor
            return nbytes(node) * factor
        if not can_code(node):
            return math.inf
        if packet(node) in VIEWS:
            factor += _PER_VIEW
        bits = self._bits[node, copy] + _RANGE_BITS
        return numel(held) * bits / 8 * factor


def can_code(node):
    """Whether a value has a layout, shape and dtype of codes."""
    held = value(node)
    return (
        is_dense(held)
        and numel(held) > 0
        and packet(node) not in (aten.expand, aten.as_strided)
        and held.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def can_pack(node):
    """Whether a predicate is kept as a bit an element."""
    held = value(node)
    return numel(held) >= _SMALLEST_MASK and is_dense(held)


def _connect(network, start, end, capacity):
    # Edges without a capacity have an infinite one.
    if capacity == math.inf:
        network.add_edge(start, end)
    else:
        # Whole numbers: flows in floats do not add up.
        network.add_edge(start, end, capacity=round(capacity * 64))


def _distances(joint):
    """Steps from values to the gradients that read them."""
    distances = {}
    for node in reversed(list(joint.graph.nodes)):
        if node.op == 'output' or node in joint.gradients:
            continue
        users = [
            0 if user in joint.gradients else distances[user]
            for user in node.users
            if user.op != 'output'
        ]
        distances[node] = min(users, default=10**6) + 1
    return distances
