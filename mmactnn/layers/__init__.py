"""Compressed layers: subclasses of their torch parents."""

from .act import QReLU
from .base import QuantizedLayer
from .conv import QConv2d
from .norm import QBatchNorm, QBatchNorm2d
from .sync_norm import QSyncBatchNorm

__all__ = [
    'QBatchNorm',
    'QBatchNorm2d',
    'QConv2d',
    'QReLU',
    'QSyncBatchNorm',
    'QuantizedLayer',
]
