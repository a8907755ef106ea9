"""Compressed layers: subclasses of their torch parents."""

from .act import QReLU
from .base import CodedLayer, QuantizedLayer
from .conv import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
)
from .group_norm import QGroupNorm
from .linear import QLinear
from .norm import QBatchNorm, QBatchNorm1d, QBatchNorm2d, QBatchNorm3d
from .sync_norm import QSyncBatchNorm

__all__ = [
    'CodedLayer',
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
    'QGroupNorm',
    'QLinear',
    'QReLU',
    'QSyncBatchNorm',
    'QuantizedLayer',
]
