"""Matrix products with weights."""

import torch.nn.functional as F

from .. import autograd
from ..layers import QLinear
from ..registry import register_function


@register_function(F.linear, layer=QLinear)
def linear(quantizer, input, weight, bias=None):
    """``F.linear``."""
    # A weight that is computed is kept itself.
    if weight.dim() != 2 or not input.dim():
        return NotImplemented
    return autograd.linear(input, weight, bias, quantizer)
