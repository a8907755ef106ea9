"""Products of activations."""

import torch

from .. import autograd
from ..autograd.product import is_coded
from ..layers import QMatrixProduct, QProduct
from ..ops.quantize import VALID_DTYPES
from ..registry import register_function


def _are_activations(input, other, out=None):
    """Whether both factors need gradients."""
    return (
        out is None
        and isinstance(other, torch.Tensor)
        and isinstance(input, torch.Tensor)
        and other.requires_grad
        and input.requires_grad
    )


@register_function(
    torch.mul,
    torch.multiply,
    torch.Tensor.mul,
    torch.Tensor.multiply,
    layer=QProduct,
    takes=_are_activations,
    needs_parameters=True,
)
def product(quantizer, input, other, out=None):
    """``input * other``, where both need gradients."""
    if not (input.dim() and other.dim()) or not _has_codes(input, other):
        return NotImplemented
    return autograd.product(input, other, quantizer)


def _is_square(input, exponent):
    """Whether a power is the square of a tensor that is no leaf."""
    return (
        isinstance(exponent, (int, float))
        and exponent == 2
        and _is_activation(input)
    )


def _is_activation(input):
    """Whether a tensor is computed from what needs gradients."""
    return isinstance(input, torch.Tensor) and not input.is_leaf


@register_function(
    torch.pow,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    layer=QProduct,
    takes=_is_square,
    needs_parameters=True,
)
def power(quantizer, input, exponent):
    """``input ** 2``."""
    return square(quantizer, input)


@register_function(
    torch.square,
    torch.Tensor.square,
    layer=QProduct,
    takes=_is_activation,
    needs_parameters=True,
)
def square(quantizer, input):
    """``input * input``: both factors have one payload."""
    if not input.dim():
        return NotImplemented
    return autograd.product(input, input, quantizer)


@register_function(
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.bmm,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
    layer=QMatrixProduct,
    takes=_are_activations,
    needs_parameters=True,
)
def matrix_product(quantizer, input, other, out=None):
    """``input @ other``, where both need gradients."""
    if min(input.dim(), other.dim()) < 2 or not _has_codes(input, other):
        return NotImplemented
    return autograd.matrix_product(input, other, quantizer)


def _is_of_activations(equation, *factors):
    """Whether there are two factors that need gradients."""
    return (
        isinstance(equation, str)
        and len(factors) == 2
        and _are_activations(*factors)
    )


@register_function(
    torch.einsum,
    layer=QMatrixProduct,
    takes=_is_of_activations,
    needs_parameters=True,
)
def einsum(quantizer, equation, input, other):
    """``torch.einsum`` of two tensors that need gradients."""
    if (
        not (input.dim() and other.dim())
        or not autograd.can_contract(equation, input, other)
        or not _has_codes(input, other)
    ):
        return NotImplemented
    return autograd.contraction(equation, input, other, quantizer)


def _has_codes(input, other):
    """Whether a factor is large beside the other one, and no leaf."""
    size = max(input.numel(), other.numel())
    return other.dtype in VALID_DTYPES and (
        is_coded(input, size) or is_coded(other, size)
    )
