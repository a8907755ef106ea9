"""Adapters for MMSegmentation, imported once a model has its classes."""

from mmseg.models.necks import FPN

from ..registry import register_adapter
from .decode_head import QDecodeHead
from .fpn import FPNAdapter

__all__ = ['QDecodeHead', 'QSegFPN']


@register_adapter(FPN, fingerprints=['5d9054dbd2c9bbcd'])
class QSegFPN(FPNAdapter, FPN):
    """MMSegmentation's ``FPN`` whose extra levels come from layers.

    Args:
        *args: As ``FPN``.
        **kwargs: As ``FPN``.
    """
