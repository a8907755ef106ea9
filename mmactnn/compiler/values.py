"""Values of a graph: their sizes and layouts, from fake tensors."""

import math

import torch
from torch import fx

# Where in the model a value comes from.
_PLACES = ('nn_module_stack', 'fwd_nn_module_stack')


def value(node):
    """Fake value of a node, or None."""
    return node.meta.get('val')


def is_tensor(node):
    """Whether the value of a node is one tensor."""
    return isinstance(value(node), torch.Tensor)


def is_symbol(node):
    """Whether the value of a node is a number that depends on shapes."""
    return isinstance(
        value(node), (torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def hint(number):
    """A size as the example has it.

    Args:
        number (int | SymInt): The size.

    Returns:
        int, optional: None if it depends on data.
    """
    if isinstance(number, int):
        return number
    return number.node.hint


def numel(tensor):
    """Elements of a fake tensor as the example has them; 0 if unknown."""
    sizes = [hint(size) for size in tensor.shape]
    return 0 if None in sizes else math.prod(sizes)


def nbytes(node):
    """Memory of the value of a node, in bytes.

    Args:
        node (fx.Node): Any node.

    Returns:
        int: Of all tensors if there are several; 8 for a number.
    """
    held = value(node)
    if isinstance(held, torch.Tensor):
        return numel(held) * held.element_size()
    if isinstance(held, (tuple, list)):
        return sum(
            numel(x) * x.element_size()
            for x in held
            if isinstance(x, torch.Tensor)
        )
    return 8


def memory_order(tensor):
    """Dimensions of a fake tensor from the outermost to the innermost.

    Args:
        tensor (Tensor[*]): Any layout.

    Returns:
        list[int]: A permutation.
    """
    strides = [hint(stride) or 0 for stride in tensor.stride()]
    return sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))


def inverse(order):
    """The inverse of a permutation."""
    return [order.index(d) for d in range(len(order))]


def is_dense(tensor):
    """Whether the elements of a fake tensor fill one piece of memory."""
    expected = 1
    for d in reversed(memory_order(tensor)):
        size, stride = hint(tensor.shape[d]), hint(tensor.stride(d))
        if size is None or stride is None:
            return False
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def emit(graph, op, *args, **kwargs):
    """Insert a call at the graph's insertion point, with its fake value.

    Args:
        graph (fx.Graph): The graph.
        op (OpOverload): The operation.
        *args: Its arguments; nodes stand for their values.
        **kwargs: The same.

    Returns:
        fx.Node: The call.
    """
    node = graph.call_function(op, args, kwargs)
    source = next((a for a in args if isinstance(a, fx.Node)), None)
    if source is not None:
        for key in _PLACES:
            if key in source.meta:
                node.meta[key] = source.meta[key]
    values = fx.node.map_arg((args, kwargs), value)
    with _mode_of(args, graph):
        node.meta['val'] = op(*values[0], **values[1])
    return node


def _mode_of(args, graph):
    for node in (*args, *graph.nodes):
        if isinstance(node, fx.Node) and is_tensor(node):
            return value(node).fake_mode
    raise RuntimeError('the graph holds no tensor')
