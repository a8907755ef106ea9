"""Pooling."""

import math

import torch.nn.functional as F

from .. import autograd
from ..layers import QAdaptiveAvgPool2d, QAvgPool2d, QMaxPool2d
from ..layers.pool import MAX_TAPS
from ..ops import as_pair
from ..registry import register_function


@register_function(F.avg_pool2d, layer=QAvgPool2d)
def avg_pool2d(
    quantizer,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    """``F.avg_pool2d``."""
    return autograd.avg_pool2d(
        input,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
        quantizer,
    )


@register_function(F.adaptive_avg_pool2d, layer=QAdaptiveAvgPool2d)
def adaptive_avg_pool2d(quantizer, input, output_size):
    """``F.adaptive_avg_pool2d``."""
    # A mean, which keeps nothing.
    if as_pair(output_size) == (1, 1):
        return NotImplemented
    return autograd.adaptive_avg_pool2d(input, output_size, quantizer)


@register_function(F.max_pool2d, layer=QMaxPool2d)
def max_pool2d(
    quantizer,
    input,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
):
    """``F.max_pool2d``."""
    if return_indices or math.prod(as_pair(kernel_size)) > MAX_TAPS:
        return NotImplemented
    return autograd.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode, quantizer
    )
