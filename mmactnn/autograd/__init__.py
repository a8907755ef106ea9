"""Autograd functions that keep payloads instead of tensors."""

from .attention import (
    ExplicitCore,
    FusedCore,
    attention,
    can_code_attention,
    dot_product_attention,
)
from .batch_norm import batch_norm
from .chain import Chain, OutputPayload, run_chain
from .coded_function import coded_function
from .conv import convolution
from .deformable import deformable_attention
from .derived_conv import derived_convolution
from .double_backward import first_order_only, linear_map
from .dropout import dropout, feature_dropout
from .early_gradient import inputs_of, run_loss
from .gate import gate
from .group_norm import group_norm
from .layer_norm import layer_norm, rms_norm
from .linear import linear
from .matrix_product import can_contract, contraction, matrix_product
from .norm_act import norm_act, norm_for_smooth
from .placeholders import meta_tensor
from .pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .prelu import prelu
from .product import product
from .relu import relu, relu_codes
from .resized_cross_entropy import PixelLosses, resized_cross_entropy
from .smooth import has_joint_code, smooth, smooth_of_norm

__all__ = [
    'Chain',
    'ExplicitCore',
    'FusedCore',
    'OutputPayload',
    'PixelLosses',
    'adaptive_avg_pool2d',
    'attention',
    'avg_pool2d',
    'batch_norm',
    'can_code_attention',
    'can_contract',
    'coded_function',
    'contraction',
    'convolution',
    'deformable_attention',
    'derived_convolution',
    'dot_product_attention',
    'dropout',
    'feature_dropout',
    'first_order_only',
    'gate',
    'group_norm',
    'has_joint_code',
    'inputs_of',
    'layer_norm',
    'linear',
    'linear_map',
    'matrix_product',
    'max_pool2d',
    'meta_tensor',
    'norm_act',
    'norm_for_smooth',
    'prelu',
    'product',
    'relu',
    'relu_codes',
    'resized_cross_entropy',
    'rms_norm',
    'run_chain',
    'run_loss',
    'smooth',
    'smooth_of_norm',
]
