"""Attention: one consistent softmax, computed again from coded operands.

The gradient of a softmax is quadratic in its output, so that codes of the
output are no choice, nor are exact sums beside decoded scores: terms that
cancel would not. The backward pass therefore reads nothing of an attention
but its decoded operands, and repeats all between these and the output.
"""

from typing import NamedTuple

import torch

from .classes import AFFINE, CASTS, MATRIX_PRODUCTS, VIEWS, packet
from .joint import packet_of, through

aten = torch.ops.aten


class Replays(NamedTuple):
    """Values that the backward pass computes again from coded operands.

    Attributes:
        nodes (set[fx.Node]): These values.
        operands (set[fx.Node]): Queries and keys (or what they are made of),
            and of fused attention values, whose codes they start from.
    """

    nodes: set
    operands: set


def find_replays(joint):
    """Find the attention of a joint graph, fused and in separate calls.

    Args:
        joint (Joint): The graph.

    Returns:
        Replays: Its values and operands.
    """
    replays = Replays(set(), set())
    for node in joint.graph.nodes:
        if node in joint.gradients or node.op != 'call_function':
            continue
        if _is_fused(node):
            _add_fused(joint, node, replays)
        elif packet(node) is aten.div:
            _add_softmax(joint, node, replays)
    return replays


def _is_fused(node):
    """Whether a node is torch's attention, by the shape of its schema."""
    schema = getattr(node.target, '_schema', None)
    if schema is None or len(schema.returns) < 2:
        return False
    names = [argument.name for argument in schema.arguments]
    return names[:3] == ['query', 'key', 'value'] and 'dropout_p' in names


def _dropout_of(node):
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == 'dropout_p':
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(argument.name, argument.default_value)
    return None


def _add_fused(joint, node, replays):
    results = {u for u in node.users if u not in joint.gradients}
    operands = node.args[:3]
    backward = [
        user
        for result in results
        for user in result.users
        if user in joint.gradients and all(x in user.args for x in operands)
    ]
    # A mask of dropout cannot be drawn again.
    if not backward or _dropout_of(node) != 0.0:
        return
    if all(map(joint.is_large, operands)):
        replays.nodes.add(node)
        replays.operands.update(operands)
        only_there = {
            result
            for result in results
            if any(user in backward for user in result.users)
        }
        replays.nodes.update(only_there)


def _add_softmax(joint, quotient, replays):
    moves = VIEWS | CASTS
    exponential = through(quotient.args[0], CASTS)
    total = through(quotient.args[1], moves)
    if packet_of(exponential) is not aten.exp or (
        packet_of(total) is not aten.sum
        or through(total.args[0], CASTS) is not exponential
    ):
        return
    found = _between(joint, exponential)
    if found is None:
        return
    nodes, operands = found
    nodes |= {quotient, total}
    nodes |= _moved(quotient.args[0], exponential, CASTS)
    nodes |= _moved(quotient.args[1], total, moves)
    nodes |= _moved(total.args[0], exponential, CASTS)
    replays.nodes.update(nodes)
    replays.operands.update(operands)
    _add_followers(joint, quotient, replays)


def _between(joint, exponential):
    """Values from the product of queries and keys on, and its operands."""
    nodes, operands, todo = set(), set(), [exponential]
    while todo:
        node = todo.pop()
        op = packet(node)
        if node in nodes or (joint.is_cheap(node) and op is not aten.amax):
            continue
        if op in MATRIX_PRODUCTS:
            pair = node.args[-2:]
            if not all(map(joint.is_large, pair)):
                return None
            nodes.add(node)
            operands.update(pair)
            # Summands of a product: biases.
            todo += [n for n in node.args[:-2] if packet_of(n) is not None]
        elif op in (aten.amax, aten.exp) or (
            joint.is_recomputable(node) and node.op == 'call_function'
        ):
            nodes.add(node)
            todo += node.all_input_nodes
        else:
            return None
    return (nodes, operands) if operands else None


def _moved(node, source, ops):
    """Nodes from one upwards to the value that it moves or casts."""
    found = set()
    while node is not source and packet_of(node) in ops:
        found.add(node)
        node = node.args[0]
    return found


def _add_followers(joint, quotient, replays):
    """Add nodes that follow from the weights: views, casts, dropout."""
    todo = [quotient]
    while todo:
        for user in todo.pop().users:
            if user in joint.gradients or user in replays.nodes:
                continue
            others = [
                n for n in user.all_input_nodes if n not in replays.nodes
            ]
            if packet(user) in AFFINE | {aten.mul} and not any(
                map(joint.is_large, others)
            ):
                replays.nodes.add(user)
                todo.append(user)


def is_operand(node, replays):
    """Whether a value is an operand of attention, or one that was moved.

    Args:
        node (fx.Node): The value.
        replays (Replays): The attention.
    """
    while node not in replays.operands:
        if packet_of(node) not in VIEWS | CASTS:
            return False
        node = node.args[0]
    return True
