"""Helpers for tests of chains."""

from support.layers import assert_same_bits


def nodes(output):
    """Names of the nodes of a graph.

    Args:
        output (Tensor[*]): What the graph is of.

    Returns:
        list[str]: In no particular order.
    """
    names, todo, seen = [], [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        todo += [parent for parent, _ in node.next_functions]
    return names


def assert_equal(found, expected):
    """Assert that results are the same bits.

    Args:
        found (dict[str, Tensor | None]): Results by their names.
        expected (dict[str, Tensor | None]): Likewise.
    """
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None
        else:
            assert_same_bits(found[key], value)
