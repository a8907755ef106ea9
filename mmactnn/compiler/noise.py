"""Bits of payloads by the noise that their rounding adds to gradients.

A payload that ends in one parameter's gradient disturbs that one alone. A
factor of a gradient disturbs the gradients of all that was computed before.
With r as the relative variance that codes of one bit more than none add where
they are read, an allocation minimises the sum over payloads of
``r * reach / (2 ** bits - 1) ** 2``, reach being the share of the weights'
gradients that are disturbed, under the bits of the level altogether.
"""

import heapq

from .demands import Role
from .values import numel, value

# Relative variances at one bit, from the gradient errors of three transformer
# blocks of width 128 with codes of one role at a time.
_VARIANCES = {Role.WEIGHT: 1.6, Role.FACTOR: 0.06, Role.NORM: 1e-4}
_FEWEST, _MOST = 2, 8


def allocate(graph, roles, bits):
    """Move bits between payloads at the same memory.

    Queries, keys, values and images keep theirs: their rounding biases
    gradients, or they are few.

    Args:
        graph (fx.Graph): The joint graph.
        roles (dict[fx.Node, set[Role]]): Roles of each payload.
        bits (dict[fx.Node, int]): Its bits at the level.

    Returns:
        dict[fx.Node, int]: Bits, of a sum, weighted by elements, that is not
        larger.
    """
    bits = dict(bits)
    free = [
        n
        for n in graph.nodes
        if n in bits and roles[n] <= _VARIANCES.keys() and bits[n] >= _FEWEST
    ]
    weights = [n for n in free if Role.WEIGHT in roles[n]]
    if not weights:
        return bits
    places = {node: i for i, node in enumerate(graph.nodes)}
    budget = sum(bits[n] * numel(value(n)) for n in free)
    noise = {}
    for node in free:
        before = sum(places[w] < places[node] for w in weights)
        reach = before / len(weights)
        noise[node] = sum(
            _VARIANCES[role]
            * (1 / len(weights) if role is Role.WEIGHT else reach)
            for role in roles[node]
        )
        bits[node] = _FEWEST
        budget -= _FEWEST * numel(value(node))

    def gain(node):
        steps = 2 ** bits[node] - 1
        less = 1 / steps**2 - 1 / (2 * steps + 1) ** 2
        return noise[node] * less / numel(value(node))

    heap = [(-gain(n), places[n], n) for n in free]
    heapq.heapify(heap)
    while heap:
        _, place, node = heapq.heappop(heap)
        if bits[node] == _MOST or numel(value(node)) > budget:
            continue
        bits[node] += 1
        budget -= numel(value(node))
        heapq.heappush(heap, (-gain(node), place, node))
    return bits
