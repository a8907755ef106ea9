"""Allocation of bits to the payloads of a graph."""

import torch
from torch import fx

from mmactnn.compiler.demands import Role
from mmactnn.compiler.noise import allocate


def make_graph(*sizes):
    """Graph of values of given sizes, in this order."""
    graph = fx.Graph()
    nodes = []
    for i, size in enumerate(sizes):
        node = graph.placeholder(f'x{i}')
        node.meta['val'] = torch.empty(size, device='meta')
        nodes.append(node)
    return graph, nodes


def test_small_payloads_and_far_reach_get_bits():
    """Bits go where they lower the noise most, under the same memory."""
    graph, nodes = make_graph(4096, 256, 4096, 1024, 512)
    weight, small, factor, late, query = nodes
    roles = {
        weight: {Role.WEIGHT},
        small: {Role.WEIGHT, Role.NORM},
        factor: {Role.FACTOR},
        late: {Role.WEIGHT},
        query: {Role.ATTENTION},
    }
    bits = {weight: 2, small: 2, factor: 4, late: 2, query: 4}
    found = allocate(graph, roles, bits)
    assert found[query] == 4
    assert found[small] > found[late] >= found[weight] > found[factor] >= 2

    def memory(bits):
        return sum(n.meta['val'].numel() * b for n, b in bits.items())

    assert memory(bits) - 1024 < memory(found) <= memory(bits)


def test_nothing_to_move():
    graph, (one,) = make_graph(512)
    roles = {one: {Role.FACTOR}}
    assert allocate(graph, roles, {one: 4}) == {one: 4}
    assert allocate(graph, {one: {Role.WEIGHT}}, {one: 1}) == {one: 1}
