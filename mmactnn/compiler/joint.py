"""Joint graph of forward and backward pass, in canonical form.

Rewriting exposes what the backward pass is linear in. Each step keeps every
value, up to the rounding of floats in gradients:

* ReLU is a choice by its mask, so that the mask is a predicate of its input
  and the rest is affine;
* ``x - mean`` in the backward pass of a batch normalisation is the normalised
  value times the deviation, so that one value serves all of it;
* factors of a gradient are multiplied with each other first, so that their
  product is kept instead of each.
"""

import operator

import torch

from .classes import (
    AFFINE,
    CASTS,
    CONSTANTS,
    EXPENSIVE,
    LINEAR_IN_FIRST,
    PRODUCTS,
    VIEWS,
    is_cheap_to_repeat,
    is_fused_multiply_add,
    is_random,
    packet,
)
from .values import emit, is_tensor, nbytes, value

aten = torch.ops.aten


class Joint:
    """Joint graph, and classes of its nodes.

    Args:
        module (fx.GraphModule): The joint graph; changed.
        num_outputs (int): Number of outputs of the forward pass.
        static_inputs (Sequence[int]): Positions of inputs that live on
            without being kept: parameters and buffers.
        min_bytes (int): Size from which on values are worth codes.

    Attributes:
        graph (fx.Graph): The graph.
        gradients (set[fx.Node]): Nodes that depend on a gradient.
        constants (set[fx.Node]): Nodes that depend on static inputs alone.
    """

    def __init__(self, module, num_outputs, static_inputs, min_bytes):
        self.module = module
        self.num_outputs = num_outputs
        self.min_bytes = min_bytes
        self.graph = module.graph
        _drop_names(self.graph)
        self.graph.eliminate_dead_code()
        self.gradients = self._find_gradients()
        _expose_relu(self)
        _expose_normalised(self)
        _merge_factors(self)
        self.graph.eliminate_dead_code()
        self.gradients = self._find_gradients()
        primals = [
            n
            for n in self.graph.nodes
            if n.op == 'placeholder' and n not in self.gradients
        ]
        self.parameters = {
            n for i, n in enumerate(primals) if i in set(static_inputs)
        }
        self.constants = self._find_constants()
        self.normalised = _find_normalised(self)
        self._cheap = {}

    @property
    def outputs(self):
        """list: Outputs of both passes."""
        return next(iter(reversed(self.graph.nodes))).args[0]

    @property
    def has_backward(self):
        """bool: Whether there is a gradient at all."""
        return bool(self.gradients)

    def gradient_inputs(self):
        """Uses of values of the forward pass by gradients.

        Yields:
            tuple[fx.Node, int, fx.Node]: User, position of the argument (-1
            for arguments by name) and value.
        """
        for user in self.graph.nodes:
            if user not in self.gradients or user.op == 'output':
                continue
            for position, argument in enumerate(user.args):
                for node in _nodes_in(argument):
                    if node not in self.gradients:
                        yield user, position, node
            for node in _nodes_in(list(user.kwargs.values())):
                if node not in self.gradients:
                    yield user, -1, node

    def is_large(self, node):
        """Whether codes of a value are worth it, if it may have codes."""
        return (
            is_tensor(node)
            and node not in self.constants
            and value(node).is_floating_point()
            and nbytes(node) >= self.min_bytes
        )

    def is_cheap(self, node):
        """Whether an exact copy costs little: codes are no alternative."""
        if node not in self._cheap:
            self._cheap[node] = self._find_cheap(node)
        return self._cheap[node]

    def _find_cheap(self, node):
        if not is_tensor(node):
            several = isinstance(value(node), (tuple, list))
            return node in self.constants or not several
        if not self.is_large(node):
            return True
        pointwise = CASTS | VIEWS | PRODUCTS | {aten.where, aten.sub, aten.add}
        return packet(node) in pointwise and all(
            map(self.is_cheap, node.all_input_nodes)
        )

    def is_recomputable(self, node):
        """Whether a value may be computed again in the backward pass."""
        if node.op == 'get_attr':
            return True
        op = packet(node)
        if op is None:
            return False
        if must_recompute(node):
            return True
        if op in EXPENSIVE or is_random(op):
            return False
        if node in self.constants or op in CONSTANTS | VIEWS | CASTS:
            return True
        if op in (AFFINE | LINEAR_IN_FIRST | {aten.where}):
            return True
        if is_cheap_to_repeat(op):
            return True
        tags = getattr(node.target, 'tags', ())
        if torch.Tag.nondeterministic_seeded in tags:
            return False
        return torch.Tag.pointwise in tags or is_fused_multiply_add(op)

    def affine_inputs(self, node):
        """Inputs that a value is affine in, and those it needs exactly.

        Args:
            node (fx.Node): The value.

        Returns:
            dict[fx.Node, bool], optional: Whether codes of the input will
            do; None if the value is not affine in one large input.
        """
        op, inputs = packet(node), node.all_input_nodes
        large = [n for n in inputs if not self.is_cheap(n)]
        if op in AFFINE:
            if op in (aten.add, aten.sub) and len(large) > 1:
                # Codes of the sum: one payload, and one noise.
                return None
            return dict.fromkeys(inputs, True)
        if op is aten.where:
            affine = dict.fromkeys(inputs, True)
            affine[node.args[0]] = False
            return affine
        if op in PRODUCTS or is_fused_multiply_add(op):
            if len(large) > 1 or any(node.args.count(n) > 1 for n in large):
                return None
            return {n: n in large for n in inputs}
        if op in LINEAR_IN_FIRST:
            return {n: n is node.args[0] for n in inputs}
        return None

    def _find_gradients(self):
        found = set()
        for node in self.graph.nodes:
            if node.op == 'output':
                continue
            if is_tangent(node) or any(
                n in found for n in node.all_input_nodes
            ):
                found.add(node)
        return found

    def _find_constants(self):
        found = set()
        for node in self.graph.nodes:
            if node.op == 'output' or node in self.gradients:
                continue
            if node.op == 'placeholder':
                known = node in self.parameters or not is_tensor(node)
            elif node.op == 'get_attr':
                known = True
            else:
                known = not is_random(packet(node)) and all(
                    n in found for n in node.all_input_nodes
                )
                tags = getattr(node.target, 'tags', ())
                known &= torch.Tag.nondeterministic_seeded not in tags
            if known:
                found.add(node)
        return found


def is_tangent(node):
    """Whether a node is a gradient that the backward pass is given."""
    return node.op == 'placeholder' and 'tangents' in str(node.target)


def must_recompute(node):
    """Whether a user's checkpointing asks for a value to be recomputed."""
    policy = node.meta.get('recompute')
    return policy is not None and policy.name in (
        'MUST_RECOMPUTE',
        'PREFER_RECOMPUTE',
    )


def must_save(node):
    """Whether a value is to be kept as it is."""
    policy = node.meta.get('recompute')
    return policy is not None and policy.name == 'MUST_SAVE'


def through(node, ops):
    """The value that a node moves or casts.

    Args:
        node (fx.Node): Any node.
        ops (set): Operations to look through.

    Returns:
        object: The first node, from ``node`` upwards, of another operation.
    """
    ops = ops - {operator.getitem}
    while isinstance(node, torch.fx.Node) and packet(node) in ops:
        node = node.args[0]
    return node


def _nodes_in(argument):
    if isinstance(argument, torch.fx.Node):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [n for n in argument if isinstance(n, torch.fx.Node)]
    return []


def _drop_names(graph):
    """Let users of a value by another name read the value itself."""
    for node in list(graph.nodes):
        if packet(node) not in (aten.alias, aten.detach):
            continue
        for user in list(node.users):
            # Outputs have tensor objects of their own.
            if user.op != 'output':
                user.replace_input_with(node, node.args[0])


def _expose_relu(joint):
    graph = joint.graph
    for node in list(graph.nodes):
        if packet(node) is not aten.relu or node in joint.gradients:
            continue
        if not value(node).is_floating_point():
            continue
        before = node.args[0]
        with graph.inserting_before(node):
            mask = emit(graph, aten.le.Scalar, before, 0)
            zero = emit(
                graph,
                aten.full.default,
                [],
                0.0,
                dtype=value(node).dtype,
                device=value(node).device,
            )
            chosen = emit(graph, aten.where.self, mask, zero, before)
        for meta in ('recompute', 'ac_graph_id', 'nn_module_stack'):
            if meta in node.meta:
                for new in (mask, zero, chosen):
                    new.meta[meta] = node.meta[meta]
        for user in list(node.users):
            if packet(user) is aten.le and user.args[1] == 0:
                user.replace_all_uses_with(mask)
                graph.erase_node(user)
        node.replace_all_uses_with(chosen)
        graph.erase_node(node)


def _expose_normalised(joint):
    graph, moves = joint.graph, VIEWS | CASTS
    places = {node: i for i, node in enumerate(graph.nodes)}
    differences = [
        node
        for node in graph.nodes
        if packet(node) is aten.sub
        and len(node.args) == 2
        and all(isinstance(a, torch.fx.Node) for a in node.args)
    ]
    by_mean = {}
    for node in differences:
        mean = through(node.args[1], moves)
        by_mean.setdefault(mean, []).append(node)
    for statistics in list(graph.nodes):
        if packet(statistics) is not aten.var_mean:
            continue
        source = through(statistics.args[0], CASTS)
        for mean in statistics.users:
            if mean.args[1:] != (1,):
                continue
            found = [
                node
                for node in by_mean.get(mean, ())
                if through(node.args[0], CASTS) is source
            ]
            _replace_differences(joint, found, places)


def _replace_differences(joint, found, places):
    graph, moves = joint.graph, VIEWS | CASTS
    normalised = None
    for difference in found:
        for user in difference.users:
            if packet(user) is not aten.mul or user in joint.gradients:
                continue
            other = next((a for a in user.args if a is not difference), None)
            if packet_of(through(other, moves)) is aten.rsqrt:
                normalised, factor, first = user, other, difference
                break
        if normalised is not None:
            break
    if normalised is None:
        return
    for difference in found:
        if difference is first or places[difference] < places[normalised]:
            continue
        old, new = value(difference), value(normalised)
        if old.shape != new.shape or old.dtype != new.dtype:
            continue
        with graph.inserting_before(difference):
            deviation = emit(graph, aten.reciprocal.default, factor)
            product = emit(graph, aten.mul.Tensor, normalised, deviation)
        difference.replace_all_uses_with(product)
        graph.erase_node(difference)


def packet_of(node):
    """:func:`packet` of anything: None unless it is a node."""
    return packet(node) if isinstance(node, torch.fx.Node) else None


def _find_normalised(joint):
    """Values of zero mean and unit variance, and what moves them."""
    found = set()
    for node in joint.graph.nodes:
        if node in joint.gradients or node.op != 'call_function':
            continue
        inputs = node.all_input_nodes
        if packet(node) in VIEWS | CASTS:
            if inputs and inputs[0] in found:
                found.add(node)
        elif packet(node) is aten.mul and len(inputs) == 2:
            small = [n for n in inputs if nbytes(n) * 2 <= nbytes(node)]
            ops = {packet_of(through(n, VIEWS | CASTS)) for n in small}
            for other in inputs:
                difference = packet_of(through(other, CASTS)) is aten.sub
                if difference and aten.rsqrt in ops:
                    found.add(node)
                if other in found and aten.reciprocal in ops:
                    found.add(node)
    return found


def _merge_factors(joint):
    graph, gradients = joint.graph, joint.gradients
    for node in list(graph.nodes):
        split = _gradient_and_factor(node, gradients)
        while split is not None:
            gradient, factor = split
            inner = _gradient_and_factor(gradient, gradients)
            if inner is None or len(gradient.users) != 1:
                break
            source, first = inner
            if not _alike(factor, first, node) or (
                nbytes(factor) < joint.min_bytes
            ):
                break
            with graph.inserting_before(node):
                product = emit(graph, aten.mul.Tensor, first, factor)
            node.args = (source, product)
            gradients.discard(gradient)
            graph.erase_node(gradient)
            split = source, product


def _gradient_and_factor(node, gradients):
    """Operands of a product of a gradient and a value, if it is one."""
    if node not in gradients or packet(node) is not aten.mul:
        return None
    first, second = node.args
    pair = [a for a in node.args if isinstance(a, torch.fx.Node)]
    if len(pair) != 2 or (first in gradients) == (second in gradients):
        return None
    return (first, second) if first in gradients else (second, first)


def _alike(first, second, result):
    tensors = [value(n) for n in (first, second, result)]
    if not all(map(is_tensor, (first, second))):
        return False
    return (
        tensors[0].shape == tensors[1].shape == tensors[2].shape
        and tensors[0].dtype == tensors[1].dtype == tensors[2].dtype
    )
