"""MMEngine hooks."""

from ..mmlab.hook import ActNNHook
from ..mmlab.registry import register_hook

__all__ = ['ActNNHook']

register_hook(ActNNHook)
