"""Keeps saved tensors in pinned host memory between forward and backward."""

from .host_swap import HostSwap, attached_swap

__all__ = ['HostSwap', 'attached_swap']
