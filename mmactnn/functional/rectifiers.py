"""Activations that keep masks."""

import torch
import torch.nn.functional as F

from .. import autograd
from ..layers import QLeakyReLU, QReLU, QReLU6
from ..registry import register_function


@register_function(F.relu, torch.relu, torch.Tensor.relu, layer=QReLU)
def relu(quantizer, input, inplace=False):
    """``F.relu``."""
    return _rectify(quantizer, input, inplace)


@register_function(F.relu_, torch.relu_, torch.Tensor.relu_, layer=QReLU)
def relu_(quantizer, input):
    """``F.relu_``."""
    return _rectify(quantizer, input, True)


@register_function(F.relu6, layer=QReLU6)
def relu6(quantizer, input, inplace=False):
    """``F.relu6``."""
    return _rectify(quantizer, input, inplace, max=6.0)


@register_function(F.leaky_relu, layer=QLeakyReLU)
def leaky_relu(quantizer, input, negative_slope=0.01, inplace=False):
    """``F.leaky_relu``."""
    if inplace and negative_slope < 0:
        return NotImplemented
    return _rectify(quantizer, input, inplace, slope=negative_slope)


def _rectify(quantizer, input, inplace, **kwargs):
    # torch refuses to overwrite a leaf.
    if inplace and input.is_leaf and input.requires_grad:
        return NotImplemented
    return autograd.relu(input, inplace, quantizer, **kwargs)
