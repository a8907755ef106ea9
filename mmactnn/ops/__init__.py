"""The kernels as functions of tensors, without autograd."""

from . import _fake, layout  # noqa: F401  (registers the fake kernels)
from .quantize import (
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    VALID_BITS,
    check_format,
    dequantize,
    quantize,
)
from .relu import relu_mask, relu_mask_, relu_mask_backward
from .rows import dequantize_rows, quantize_rows, row_spread, split_bits

__all__ = [
    'DEFAULT_GROUP_SIZE',
    'GROUP_SIZES',
    'VALID_BITS',
    'check_format',
    'dequantize',
    'dequantize_rows',
    'layout',
    'quantize',
    'quantize_rows',
    'relu_mask',
    'relu_mask_',
    'relu_mask_backward',
    'row_spread',
    'split_bits',
]
