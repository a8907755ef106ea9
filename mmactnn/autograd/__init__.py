"""Autograd functions that keep payloads instead of tensors."""

from .batch_norm import batch_norm
from .conv import convolution
from .group_norm import group_norm
from .linear import linear
from .relu import relu

__all__ = ['batch_norm', 'convolution', 'group_norm', 'linear', 'relu']
