"""Payloads of codes that stand for tensors, and settings of layers."""

from .calls import Call

__all__ = ['Call']
