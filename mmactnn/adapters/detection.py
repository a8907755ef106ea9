"""Parts of MMDetection's models."""

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.layers import SELayer
from mmdet.models.layers.se_layer import ChannelAttention
from mmdet.models.necks import FPN

from ..layers import QGate, QReLU
from .base import LayeredModule
from .fpn import LayeredFPN


class QRPNHead(LayeredModule, RPNHead):
    """``RPNHead`` whose ReLU is a layer.

    Args:
        *args: As ``RPNHead``.
        **kwargs: As ``RPNHead``.
    """

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(relu=QReLU())

    def forward_single(self, x):
        """See ``RPNHead``."""
        x = self.relu(self.rpn_conv(x))
        return self.rpn_cls(x), self.rpn_reg(x)


class QFPN(LayeredFPN, FPN):
    """``FPN`` whose extra levels come from layers.

    Args:
        *args: As ``FPN``.
        **kwargs: As ``FPN``.
    """


class QChannelAttention(LayeredModule, ChannelAttention):
    """``ChannelAttention`` whose product is a layer.

    Args:
        *args: As ``ChannelAttention``.
        **kwargs: As ``ChannelAttention``.
    """

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(gate=QGate())

    def forward(self, x):
        """See ``ChannelAttention``."""
        # The mean of a large map overflows in half precision.
        with torch.autocast('cuda', enabled=False):
            out = self.global_avgpool(x)
        return self.gate(x, self.act(self.fc(out)))


class QSELayer(LayeredModule, SELayer):
    """``SELayer`` whose product is a layer.

    Args:
        *args: As ``SELayer``.
        **kwargs: As ``SELayer``.
    """

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        return dict(gate=QGate())

    def forward(self, x):
        """See ``SELayer``."""
        out = self.conv1(self.global_avgpool(x))
        return self.gate(x, self.conv2(out))
