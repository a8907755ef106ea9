"""Attention."""

import torch.nn.functional as F

from .. import autograd
from ..layers import QScaledDotProductAttention
from ..registry import register_function


@register_function(
    F.scaled_dot_product_attention, layer=QScaledDotProductAttention
)
def attention(quantizer, query, key, value, *args, **kwargs):
    """``F.scaled_dot_product_attention``."""
    return autograd.dot_product_attention(
        quantizer, query, key, value, *args, **kwargs
    )
