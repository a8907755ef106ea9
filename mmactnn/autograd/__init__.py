"""Autograd functions that keep payloads instead of tensors."""

from .batch_norm import batch_norm
from .conv import convolution
from .relu import relu

__all__ = ['batch_norm', 'convolution', 'relu']
