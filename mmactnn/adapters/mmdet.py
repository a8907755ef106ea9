"""Adapters for MMDetection, imported once a model has one of its classes."""

from mmdet.models.necks import FPN

from ..registry import register_adapter
from .fpn import FPNAdapter
from .gates import QChannelAttention, QSELayer
from .heads import QDenseHead, QRetinaHead, QRPNHead
from .normed import QNormedConv2d

__all__ = [
    'QChannelAttention',
    'QDenseHead',
    'QFPN',
    'QNormedConv2d',
    'QRPNHead',
    'QRetinaHead',
    'QSELayer',
]


@register_adapter(FPN, fingerprints=['97e61d45e7708762'])
class QFPN(FPNAdapter, FPN):
    """``FPN`` whose extra levels come from layers.

    Args:
        *args: As ``FPN``.
        **kwargs: As ``FPN``.
    """
