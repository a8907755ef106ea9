"""Activations that keep derivatives."""

import torch.nn.functional as F

from .. import autograd
from ..layers import QSiLU
from ..registry import register_function


@register_function(F.silu, layer=QSiLU)
def silu(quantizer, input, inplace=False):
    """``F.silu``."""
    # torch refuses to overwrite a leaf.
    if inplace and input.is_leaf and input.requires_grad:
        return NotImplemented
    return autograd.silu(input, quantizer, inplace)
