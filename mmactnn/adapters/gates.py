"""Adapters of MMDetection's channel attention."""

import torch
from mmdet.models.layers import SELayer
from mmdet.models.layers.se_layer import ChannelAttention

from ..layers import QGate
from ..registry import register_adapter
from .base import Adapter


# The first source, up to MMDetection 3.3, uses torch.cuda.amp.autocast.
@register_adapter(
    ChannelAttention, fingerprints=['45352f2421fef390', '58b690eb4ecc2d81']
)
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


@register_adapter(SELayer, fingerprints=['3e40790642cd75a0'])
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
