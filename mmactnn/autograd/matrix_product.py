"""Products of two matrices, or of two tensors, that are both computed."""

import functools

import torch

from .autocast import cast, lower_dtype
from .product import Bilinear


def _by_left(grad_output, other, shape):
    return (grad_output @ other.mT).sum_to_size(shape)


def _by_right(grad_output, input, shape):
    if len(shape) == 2:
        # One product, instead of a sum of one for each matrix.
        input, grad_output = input.flatten(0, -2), grad_output.flatten(0, -2)
    return (input.mT @ grad_output).sum_to_size(shape)


_MATMUL = Bilinear(torch.matmul, (_by_left, _by_right))


def matrix_product(input, other, quantizer):
    """``input @ other`` with large factors kept as codes.

    The output is exact. The gradient of a factor is linear in the other one,
    hence unbiased.

    Args:
        input (Tensor[*, M, K]): float32, float16 or bfloat16; under autocast
            it is cast to autocast's dtype.
        other (Tensor[*, K, N]): Likewise.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*, M, N]: The product.
    """
    factors = cast(lower_dtype(input), input, other)
    return _MATMUL(*factors, quantizer)


def contraction(equation, input, other, quantizer):
    """``torch.einsum(equation, input, other)`` with large factors as codes.

    The output is exact. The gradient of a factor is linear in the other one,
    hence unbiased.

    Args:
        equation (str): With an arrow, see :func:`can_contract`.
        input (Tensor[*]): float32, float16 or bfloat16.
        other (Tensor[*]): Likewise.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*]: The product.
    """
    return _contraction(equation)(input, other, quantizer)


@functools.lru_cache(maxsize=128)
def _contraction(equation):
    first, second, output = _terms(equation)

    def by(equation):
        def gradient(grad_output, factor, shape):
            # Autocast may have cast the factors.
            factor = factor.to(grad_output.dtype)
            grad = torch.einsum(equation, grad_output, factor)
            return grad.sum_to_size(shape)

        return gradient

    return Bilinear(
        lambda input, other: torch.einsum(equation, input, other),
        (by(f'{output},{second}->{first}'), by(f'{output},{first}->{second}')),
    )


def _terms(equation):
    """Subscripts of both factors and of the output."""
    factors, _, output = equation.replace(' ', '').partition('->')
    return (*factors.split(','), output)


def can_contract(equation, input, other):
    """Whether gradients of a product are products of the same kind.

    Args:
        equation (str): Equation as ``torch.einsum`` takes it.
        input (Tensor[*]): The first factor.
        other (Tensor[*]): The second one.

    Returns:
        bool: False without an arrow, for diagonals, for subscripts of one
        tensor alone, or whose sizes differ, and for an ellipsis that is not
        first, or not in each term.
    """
    if '->' not in equation or equation.count(',') != 1:
        return False
    terms = _terms(equation)
    has_ellipsis = terms[0].startswith('...')
    sizes = [{}, {}, {}]
    for term, found, factor in zip(terms, sizes, (input, other, None)):
        if term.startswith('...') != has_ellipsis:
            return False
        letters = term.removeprefix('...')
        if '.' in letters or len(set(letters)) < len(letters):
            return False
        shape = letters if factor is None else factor.shape
        if len(shape) < len(letters):
            return False
        if len(shape) > len(letters) and not has_ellipsis:
            return False
        found.update(zip(letters, shape[len(shape) - len(letters) :]))
    first, second, output = sizes
    return (
        first.keys() <= second.keys() | output.keys()
        and second.keys() <= first.keys() | output.keys()
        and output.keys() <= first.keys() | second.keys()
        and all(first[name] == second[name] for name in first.keys() & second)
    )
