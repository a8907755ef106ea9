"""The feature pyramid that MMDetection and MMSegmentation share."""

import torch.nn.functional as F

from ..layers import QMaxPool2d, QReLU
from .base import LayeredModule


class LayeredFPN(LayeredModule):
    """Mixin of the ``FPN`` whose extra levels come from layers."""

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        extra = module.num_outs - len(module.lateral_convs)
        if extra > 0 and not module.add_extra_convs:
            return dict(extra_pool=QMaxPool2d(1, stride=2))
        # The first of the extra convolutions reads no ReLU.
        if extra > 1 and module.relu_before_extra_convs:
            return dict(extra_relu=QReLU())
        return {}

    def forward(self, inputs):
        """Merge feature maps from the top down; see ``FPN``."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f'inputs must be {len(self.in_channels)} feature maps, got '
                f'{len(inputs)}'
            )
        laterals = self._merge(inputs)
        coarsest = laterals[-1]
        # From the finest, and none is held longer than its convolution needs
        # it: what is left of it then are codes.
        laterals.reverse()
        convs = iter(self.fpn_convs)
        outs = []
        while laterals:
            outs.append(next(convs)(laterals.pop()))
        extra_convs = list(convs)
        if not self.add_extra_convs:
            while len(outs) < self.num_outs:
                outs.append(self.extra_pool(outs[-1]))
        elif len(outs) < self.num_outs:
            source = {
                'on_input': inputs[self.backbone_end_level - 1],
                'on_lateral': coarsest,
                'on_output': outs[-1],
            }[self.add_extra_convs]
            outs.append(extra_convs[0](source))
            for conv in extra_convs[1:]:
                if self.relu_before_extra_convs:
                    source = self.extra_relu(outs[-1])
                else:
                    source = outs[-1]
                outs.append(conv(source))
        return tuple(outs)

    def _merge(self, inputs):
        """The lateral maps, each with those of the coarser levels added."""
        levels = inputs[self.start_level : self.backbone_end_level]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, levels)]
        for i in range(len(laterals) - 1, 0, -1):
            size = None
            if 'scale_factor' not in self.upsample_cfg:
                size = laterals[i - 1].shape[2:]
            # Into the upsampled map, which nobody else has: an activation may
            # have kept the lateral one, or a hook.
            merged = F.interpolate(laterals[i], size=size, **self.upsample_cfg)
            merged += laterals[i - 1]
            laterals[i - 1] = merged
        return laterals
