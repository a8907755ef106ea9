"""Normalisations."""

import torch
import torch.nn.functional as F

from .. import autograd
from ..layers import QGroupNorm, QLayerNorm, QRMSNorm
from ..layers.layer_norm import takes_rms_norm
from ..registry import register_function


@register_function(F.layer_norm, layer=QLayerNorm)
def layer_norm(
    quantizer, input, normalized_shape, weight=None, bias=None, eps=1e-5
):
    """``F.layer_norm``."""
    return autograd.layer_norm(
        input, normalized_shape, weight, bias, eps, quantizer
    )


@register_function(torch.layer_norm, layer=QLayerNorm)
def torch_layer_norm(
    quantizer,
    input,
    normalized_shape,
    weight=None,
    bias=None,
    eps=1e-5,
    cudnn_enable=True,
):
    """``torch.layer_norm``."""
    return layer_norm(quantizer, input, normalized_shape, weight, bias, eps)


@register_function(F.rms_norm, torch.rms_norm, layer=QRMSNorm)
def rms_norm(quantizer, input, normalized_shape, weight=None, eps=None):
    """``F.rms_norm``."""
    if not takes_rms_norm(input, normalized_shape, weight):
        return NotImplemented
    return autograd.rms_norm(input, normalized_shape, weight, eps, quantizer)


@register_function(F.group_norm, layer=QGroupNorm)
def group_norm(quantizer, input, num_groups, weight=None, bias=None, eps=1e-5):
    """``F.group_norm``."""
    if (
        input.dim() < 2
        or input.size(1) % num_groups
        or input.numel() == num_groups  # one value a group
    ):
        return NotImplemented
    return autograd.group_norm(input, num_groups, weight, bias, eps, quantizer)
