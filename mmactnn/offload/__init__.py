"""Offload of saved tensors to pinned host memory."""

from .host_swap import HostSwap, attached_swap

__all__ = ['HostSwap', 'attached_swap']
