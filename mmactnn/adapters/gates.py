"""Adapters of MMDetection's attention, whose products become layers."""

import torch
from mmdet.models.layers import SELayer
from mmdet.models.layers.se_layer import ChannelAttention

from ..layers import QGate
from ..registry import register_adapter
from .base import Adapter


@register_adapter(ChannelAttention, fingerprints=())
class QChannelAttention(Adapter, ChannelAttention):
    """``ChannelAttention`` whose product is a layer.

    Args:
        *args: As ``ChannelAttention``.
        **kwargs: As ``ChannelAttention``.
    """

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(gate=QGate())

    def adapted_forward(self, x):
        """See ``ChannelAttention``."""
        # The mean of a large map overflows in half precision.
        with torch.autocast('cuda', enabled=False):
            out = self.global_avgpool(x)
        return self.gate(x, self.act(self.fc(out)))


@register_adapter(SELayer, fingerprints=())
class QSELayer(Adapter, SELayer):
    """``SELayer`` whose product is a layer.

    Args:
        *args: As ``SELayer``.
        **kwargs: As ``SELayer``.
    """

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(gate=QGate())

    def adapted_forward(self, x):
        """See ``SELayer``."""
        out = self.conv1(self.global_avgpool(x))
        return self.gate(x, self.conv2(out))
