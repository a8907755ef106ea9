"""Compressed layers: subclasses of their torch parents."""

from .act import QLeakyReLU, QReLU, QReLU6
from .base import QuantizedLayer
from .conv import QConv2d
from .dropout import QDropout
from .norm import QBatchNorm, QBatchNorm2d
from .pool import QAdaptiveAvgPool2d, QAvgPool2d, QMaxPool2d
from .sync_norm import QSyncBatchNorm

__all__ = [
    'QAdaptiveAvgPool2d',
    'QAvgPool2d',
    'QBatchNorm',
    'QBatchNorm2d',
    'QConv2d',
    'QDropout',
    'QLeakyReLU',
    'QMaxPool2d',
    'QReLU',
    'QReLU6',
    'QSyncBatchNorm',
    'QuantizedLayer',
]
