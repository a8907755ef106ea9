"""Demands of the backward pass for values, and the bits that serve them."""

import enum
from typing import NamedTuple

import torch

from .attention import is_operand
from .classes import (
    CASTS,
    EXPENSIVE,
    VIEWS,
    is_fused_multiply_add,
    is_linear_in,
    packet,
)
from .joint import must_recompute

aten = torch.ops.aten

# Keeps a gradient a gradient of a parameter.
_ENDS = VIEWS | CASTS | {aten.sum, aten.add, aten.mean, aten.div}


class Copy(enum.Enum):
    """Copy of a value that the backward pass reads."""

    EXACT = 'exact'
    CODED = 'coded'
    # Computed again, from coded operands, in place of what was computed.
    REPLAYED = 'replayed'


class Role(enum.Enum):
    """Part that the noise of codes plays in gradients."""

    # Ends in the gradient of a parameter.
    WEIGHT = 'linear_ops'
    # Normalised value: in gradients of parameters, and of second order.
    NORM = 'norm'
    # Factor of a gradient that goes on: the noise reaches all before.
    FACTOR = 'act'
    # Queries and keys.
    ATTENTION = 'attention'
    # Values of attention.
    ATTENTION_VALUE = 'attention_value'
    # Input of the graph, such as images.
    INPUT = 'image'


class Demand(NamedTuple):
    """Use of a value by a gradient.

    Attributes:
        user (fx.Node): The node of the backward pass.
        position (int): Argument; -1 for those by name.
        node (fx.Node): The value.
        copy (Copy): What it needs.
        role (Role, optional): Of codes.
    """

    user: object
    position: int
    node: object
    copy: Copy
    role: object = None


def find_demands(joint, replays, bits_of):
    """Demands of a backward pass.

    Args:
        joint (Joint): The graph.
        replays (Replays): Its attention.
        bits_of (Callable): Bits of a role; None keeps values exactly.

    Returns:
        list[Demand]: In the order of the graph.
    """
    ends = _gradients_of_parameters(joint)
    demands = []
    if bits_of(Role.ATTENTION) is None:
        replays = replays._replace(nodes=set(), operands=set())
    for user, position, node in joint.gradient_inputs():
        demand = Demand(user, position, node, Copy.EXACT)
        if must_recompute(node):
            # A user's checkpointing: what it repeats is exact.
            pass
        elif node in replays.nodes:
            demand = demand._replace(copy=Copy.REPLAYED, role=Role.ATTENTION)
        elif joint.is_large(node):
            role = _role(joint, user, position, node, replays, ends)
            if role is not None and bits_of(role) is not None:
                demand = demand._replace(copy=Copy.CODED, role=role)
        demands.append(demand)
    return demands


def _role(joint, user, position, node, replays, ends):
    """Role of codes in a use; None if it is not linear in the value."""
    op = packet(user)
    if _reads(user, node, replays.nodes):
        # The backward pass of fused attention.
        if node in replays.operands:
            return Role.ATTENTION
        return None
    if position < 0 or not is_linear_in(op, position):
        return None
    if user.args.count(node) > 1:
        return None
    if is_operand(node, replays):
        return Role.ATTENTION
    if node in joint.normalised:
        return Role.NORM
    if user in ends or (op is aten.convolution_backward and position == 1):
        return Role.WEIGHT
    if op in EXPENSIVE:
        return Role.ATTENTION_VALUE
    return Role.FACTOR


def _reads(user, node, nodes):
    """Whether a gradient reads results of fused attention and the value."""
    if packet(user) in EXPENSIVE or is_fused_multiply_add(packet(user)):
        return False
    schema = getattr(user.target, '_schema', None)
    if schema is None:
        return False
    names = [argument.name for argument in schema.arguments]
    return {'query', 'key', 'value'} <= set(names) and any(
        n in nodes for n in user.all_input_nodes
    )


def _gradients_of_parameters(joint):
    """Nodes of which nothing is made but gradients of parameters."""
    outputs = joint.outputs[joint.num_outputs :]
    primals = [
        n
        for n in joint.graph.nodes
        if n.op == 'placeholder' and n not in joint.gradients
    ]
    others = {
        gradient
        for primal, gradient in zip(primals, outputs)
        if gradient is not None and primal not in joint.parameters
    }
    forward = set(joint.outputs[: joint.num_outputs])
    found = set()
    for node in reversed(list(joint.graph.nodes)):
        if node not in joint.gradients:
            continue
        if node in others or node in forward:
            continue
        if all(
            user.op == 'output' or (user in found and packet(user) in _ENDS)
            for user in node.users
        ):
            found.add(node)
    return found


def find_quadratic(joint, uses):
    """Payloads that a gradient is quadratic in, so that it is biased.

    Normalised values are let pass: their squares are averaged over what is
    normalised together, which leaves a bias of second order over its size.
    So is attention, whose bias is documented.

    Args:
        joint (Joint): The graph.
        uses (dict[fx.Node, list[Demand]]): Coded demands of each payload.

    Returns:
        set[fx.Node]: Payloads.
    """
    places = {n: i for i, n in enumerate(joint.graph.nodes)}
    behind = {}
    for node in reversed(list(joint.graph.nodes)):
        if node in joint.gradients:
            mask = 1 << places[node]
            for user in node.users:
                mask |= behind.get(user, 0)
            behind[node] = mask
    found = set()
    for payload, demands in uses.items():
        users = [
            (d.user, d.role)
            for d in demands
            if d.role not in (Role.ATTENTION, Role.ATTENTION_VALUE)
        ]
        for first, role in users:
            if role is Role.WEIGHT:
                continue
            for second, other in users:
                if second is first:
                    continue
                both_norm = role is Role.NORM and other is Role.NORM
                reached = behind[first] >> places[second] & 1
                if reached and not both_norm:
                    found.add(payload)
    return found
