"""Autograd functions that keep payloads instead of tensors."""

from .batch_norm import batch_norm
from .chain import Chain, OutputPayload, run_chain
from .coded_function import coded_function
from .conv import convolution
from .derived_conv import derived_convolution
from .double_backward import first_order_only, linear_map
from .dropout import dropout, feature_dropout
from .gate import gate
from .group_norm import group_norm
from .linear import linear
from .norm_act import norm_act
from .placeholders import meta_tensor
from .pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .prelu import prelu
from .relu import relu, relu_codes
from .silu import silu

__all__ = [
    'Chain',
    'OutputPayload',
    'adaptive_avg_pool2d',
    'avg_pool2d',
    'batch_norm',
    'coded_function',
    'convolution',
    'derived_convolution',
    'dropout',
    'feature_dropout',
    'first_order_only',
    'gate',
    'group_norm',
    'linear',
    'linear_map',
    'max_pool2d',
    'meta_tensor',
    'norm_act',
    'prelu',
    'relu',
    'relu_codes',
    'run_chain',
    'silu',
]
