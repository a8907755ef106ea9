"""Adaptive precision: allocation of bits to layers and samples."""

from .controller import AdaptivePrecision

__all__ = ['AdaptivePrecision']
