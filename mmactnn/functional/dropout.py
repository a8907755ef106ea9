"""Dropout."""

import torch
import torch.nn.functional as F

from .. import autograd
from ..layers import QDropout, QDropout2d
from ..registry import register_function


@register_function(F.dropout, layer=QDropout, without_grad=True)
def dropout(quantizer, input, p=0.5, training=True, inplace=False):
    """``F.dropout``."""
    if not training or not _draws(input, p, inplace):
        return NotImplemented
    return autograd.dropout(input, p, inplace, quantizer)


@register_function(F.dropout2d, layer=QDropout2d, without_grad=True)
def dropout2d(quantizer, input, p=0.5, training=True, inplace=False):
    """``F.dropout2d``."""
    if not training or input.dim() != 4 or not _draws(input, p, inplace):
        return NotImplemented
    return autograd.feature_dropout(input, p, inplace, quantizer)


def _draws(input, p, inplace):
    needs_grad = torch.is_grad_enabled() and input.requires_grad
    refused = inplace and input.is_leaf and needs_grad
    return 0 < p < 1 and not refused
