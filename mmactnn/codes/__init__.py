"""Codes that stand for tensors, and the settings that they are made by."""

from .calls import Call

__all__ = ['Call']
