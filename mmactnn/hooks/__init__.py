"""MMEngine hooks."""

from ..mmlab.hook import ActNNHook

__all__ = ['ActNNHook']
