"""Convolutions, whose weights may be computed."""

import torch
import torch.nn.functional as F

from .. import autograd, layers
from ..autograd.autocast import lower_dtype
from ..layers.conv import numeric_padding
from ..registry import register_function


def _expand(value, rank):
    """A number for each dimension from one or all of them."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _register(rank, function, layer, compress):
    """Register a convolution.

    Args:
        rank (int): Number of spatial dimensions.
        function (Callable): The function.
        layer (type): Compressed class of the convolution.
        compress (Callable): Takes the rank, the settings, and the arguments
            of the function.
    """

    def call(quantizer, input, weight, *args, **kwargs):
        # A single sample, and whatever torch refuses, is left to torch.
        if (
            not isinstance(weight, torch.Tensor)
            or not input.dim() == weight.dim() == rank + 2
            or (input.dtype != weight.dtype and lower_dtype(input) is None)
        ):
            return NotImplemented
        return compress(rank, quantizer, input, weight, *args, **kwargs)

    call.__name__ = function.__name__
    call.__doc__ = f'``F.{function.__name__}``.'
    register_function(function, layer=layer)(call)


def _convolve(
    rank,
    quantizer,
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
):
    stride, dilation = _expand(stride, rank), _expand(dilation, rank)
    if isinstance(padding, str):
        if padding != 'valid' and (padding != 'same' or set(stride) != {1}):
            return NotImplemented
        input, padding = numeric_padding(
            input, padding, weight.shape[2:], dilation
        )
    padding = _expand(padding, rank)
    geometry = stride, padding, dilation, False, (0,) * rank, groups
    return autograd.convolution(input, weight, bias, geometry, quantizer)


def _convolve_transposed(
    rank,
    quantizer,
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
):
    stride, padding, dilation, output_padding = (
        _expand(value, rank)
        for value in (stride, padding, dilation, output_padding)
    )
    geometry = stride, padding, dilation, True, output_padding, groups
    return autograd.convolution(input, weight, bias, geometry, quantizer)


_register(1, F.conv1d, layers.QConv1d, _convolve)
_register(2, F.conv2d, layers.QConv2d, _convolve)
_register(3, F.conv3d, layers.QConv3d, _convolve)
_register(1, F.conv_transpose1d, layers.QConvTranspose1d, _convolve_transposed)
_register(2, F.conv_transpose2d, layers.QConvTranspose2d, _convolve_transposed)
_register(3, F.conv_transpose3d, layers.QConvTranspose3d, _convolve_transposed)
