"""Registration of Python kernels: fake kernels, decompositions, autograd."""

import torch

from ..extension import load_error

_library = torch.library.Library('mmactnn', 'IMPL')


def fake(op):
    """Register a function as the fake kernel of an op, if there are kernels.

    Args:
        op (str): Name of the op.

    Returns:
        Callable: A decorator of the function, which has the op's arguments.
    """

    def register(function):
        if load_error() is None:
            torch.library.register_fake(f'mmactnn::{op}', function)
            without_gradient(op)
        return function

    return register


def decomposition(op):
    """Register a function that replaces an op by simpler ones when traced.

    Args:
        op (str): Name of the op.

    Returns:
        Callable: A decorator of the function, which has the op's arguments.
    """

    def register(function):
        if load_error() is None:
            _library.impl(op, function, 'CompositeImplicitAutograd')
            without_gradient(op)
        return function

    return register


def without_gradient(op):
    """Make autograd skip an op: its outputs require no gradient.

    The functions of :mod:`mmactnn.autograd` are differentiable, ops are not.
    Without this, torch gives outputs a gradient function that only warns.

    Args:
        op (str): Name of the op.
    """
    _library.impl(op, torch.library.fallthrough_kernel, 'Autograd')


def ceil_div(a, b):
    """``a / b``, rounded up to an integer."""
    return (a + b - 1) // b


def row_numel(tensor):
    """Elements of a sample; 0 if there is none."""
    if isinstance(tensor.shape[0], int) and tensor.shape[0] == 0:
        return 0
    count = 1
    for size in tensor.shape[1:]:
        count = count * size
    return count


def empty_ranges(tensor, group_size):
    """Ranges of plain codes.

    Args:
        tensor (Tensor[N, *]): What is quantised.
        group_size (int): Elements a range.

    Returns:
        Tensor[N, ceil(M / group_size), 2]: bfloat16, for M elements a sample.
    """
    groups = ceil_div(row_numel(tensor), group_size)
    return tensor.new_empty((tensor.shape[0], groups, 2), dtype=torch.bfloat16)


def empty_payload(tensor, bits, group_size):
    """Codes of one width and their ranges.

    Args:
        tensor (Tensor[N, *]): What is quantised.
        bits (int): Bits a code.
        group_size (int): Elements a range.

    Returns:
        tuple[Tensor, Tensor]: Codes (Tensor[N, ceil(M / 8) * bits], uint8)
        and ranges (Tensor[N, ceil(M / group_size), 2], bfloat16) for M
        elements a sample.
    """
    row_bytes = ceil_div(row_numel(tensor), 8) * bits
    codes = tensor.new_empty((tensor.shape[0], row_bytes), dtype=torch.uint8)
    return codes, empty_ranges(tensor, group_size)


def empty_sums(grad_output):
    """Sums of :func:`mmactnn.ops.norm_grad_sums`.

    Args:
        grad_output (Tensor[N, C, *]): The gradient that is summed.

    Returns:
        Tensor[2, C]: float32.
    """
    return grad_output.new_empty(
        (2, grad_output.shape[1]), dtype=torch.float32
    )
