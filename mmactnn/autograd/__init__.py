"""Autograd functions that keep payloads instead of tensors."""

from .batch_norm import batch_norm
from .chain import Chain, OutputPayload, run_chain
from .conv import convolution
from .double_backward import first_order_only, linear_map
from .dropout import dropout, feature_dropout
from .early_gradient import inputs_of, run_loss
from .gate import gate
from .group_norm import group_norm
from .linear import linear
from .norm_act import norm_act
from .placeholders import meta_tensor
from .pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .relu import relu, relu_codes
from .resized_cross_entropy import PixelLosses, resized_cross_entropy
from .silu import silu

__all__ = [
    'Chain',
    'OutputPayload',
    'PixelLosses',
    'adaptive_avg_pool2d',
    'avg_pool2d',
    'batch_norm',
    'convolution',
    'dropout',
    'feature_dropout',
    'first_order_only',
    'gate',
    'group_norm',
    'inputs_of',
    'linear',
    'linear_map',
    'max_pool2d',
    'meta_tensor',
    'norm_act',
    'relu',
    'relu_codes',
    'resized_cross_entropy',
    'run_chain',
    'run_loss',
    'silu',
]
