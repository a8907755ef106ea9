"""Segments: parts of a forward pass that run again from codes."""

from .checkpoint import checkpoint

__all__ = ['checkpoint']
