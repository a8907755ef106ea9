"""The kernels as functions of tensors, without autograd."""

from . import _fake, layout  # noqa: F401  (registers the fake kernels)
from .batch_norm_act import (
    NormSettings,
    batch_norm_act,
    batch_norm_act_,
    batch_norm_act_backward,
)
from .channel_stats import channel_stats
from .conv_chain import (
    NOT_ENCODED,
    PARAMETERS,
    ChainPlan,
    Encoding,
    Follows,
    Kept,
    Link,
    conv_chain,
    conv_chain_backward,
    is_input,
    source_of_input,
)
from .dropout import dropout, dropout_
from .frozen_norm import MAX_FROZEN_CHANNELS, frozen_norm_act_
from .norm_act import norm_act
from .norm_grad import norm_add_grad_sums, norm_grad_input, norm_grad_sums
from .pool import MAX_TAPS, as_pair, max_pool2d, max_pool2d_backward
from .quantize import (
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    VALID_BITS,
    check_format,
    dequantize,
    quantize,
)
from .rectified import dequantize_split, dequantize_zeroed
from .relu import relu_mask, relu_mask_, relu_mask_backward
from .relu_codes import relu_codes, relu_codes_, relu_codes_backward
from .rows import dequantize_rows, quantize_rows, row_spread, split_bits

__all__ = [
    'ChainPlan',
    'DEFAULT_GROUP_SIZE',
    'Encoding',
    'Follows',
    'GROUP_SIZES',
    'Kept',
    'Link',
    'MAX_FROZEN_CHANNELS',
    'MAX_TAPS',
    'NOT_ENCODED',
    'NormSettings',
    'PARAMETERS',
    'VALID_BITS',
    'as_pair',
    'batch_norm_act',
    'batch_norm_act_',
    'batch_norm_act_backward',
    'channel_stats',
    'check_format',
    'conv_chain',
    'conv_chain_backward',
    'dequantize',
    'dequantize_rows',
    'dequantize_split',
    'dequantize_zeroed',
    'dropout',
    'dropout_',
    'frozen_norm_act_',
    'is_input',
    'layout',
    'max_pool2d',
    'max_pool2d_backward',
    'norm_act',
    'norm_add_grad_sums',
    'norm_grad_input',
    'norm_grad_sums',
    'quantize',
    'quantize_rows',
    'relu_codes',
    'relu_codes_',
    'relu_codes_backward',
    'relu_mask',
    'relu_mask_',
    'relu_mask_backward',
    'row_spread',
    'source_of_input',
    'split_bits',
]
