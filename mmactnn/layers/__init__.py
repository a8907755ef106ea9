"""Compressed layers: subclasses of their torch parents."""

from .act import QLeakyReLU, QReLU, QReLU6, QSiLU, SmoothLayer
from .base import CodedLayer, ExactLayer, QuantizedLayer
from .conv import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
)
from .dropout import QDropout, QDropout2d
from .gate import Gate, QGate
from .group_norm import QGroupNorm
from .linear import QLinear
from .norm import QBatchNorm, QBatchNorm1d, QBatchNorm2d, QBatchNorm3d
from .pool import QAdaptiveAvgPool2d, QAvgPool2d, QMaxPool2d
from .sync_norm import QSyncBatchNorm

__all__ = [
    'CodedLayer',
    'ExactLayer',
    'Gate',
    'QAdaptiveAvgPool2d',
    'QAvgPool2d',
    'QBatchNorm',
    'QBatchNorm1d',
    'QBatchNorm2d',
    'QBatchNorm3d',
    'QConv1d',
    'QConv2d',
    'QConv3d',
    'QConvTranspose1d',
    'QConvTranspose2d',
    'QConvTranspose3d',
    'QGate',
    'QGroupNorm',
    'QLinear',
    'QDropout',
    'QDropout2d',
    'QLeakyReLU',
    'QMaxPool2d',
    'QReLU',
    'QReLU6',
    'QSiLU',
    'QSyncBatchNorm',
    'QuantizedLayer',
    'SmoothLayer',
]
