"""Autograd functions that keep payloads instead of tensors."""

from .batch_norm import batch_norm
from .chain import Chain, OutputPayload, run_chain
from .conv import convolution
from .double_backward import first_order_only, linear_map
from .dropout import dropout, feature_dropout
from .gate import gate
from .group_norm import group_norm
from .linear import linear
from .norm_act import norm_act, norm_for_smooth
from .placeholders import meta_tensor
from .pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .relu import relu, relu_codes
from .smooth import has_joint_code, smooth, smooth_of_norm

__all__ = [
    'Chain',
    'OutputPayload',
    'adaptive_avg_pool2d',
    'avg_pool2d',
    'batch_norm',
    'convolution',
    'dropout',
    'feature_dropout',
    'first_order_only',
    'gate',
    'group_norm',
    'has_joint_code',
    'linear',
    'linear_map',
    'max_pool2d',
    'meta_tensor',
    'norm_act',
    'norm_for_smooth',
    'relu',
    'relu_codes',
    'run_chain',
    'smooth',
    'smooth_of_norm',
]
