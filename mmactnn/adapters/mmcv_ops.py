"""Layers for MMCV's ops, which not every build of MMCV has."""

import torch
from mmcv.ops.deform_conv import (
    DeformConv2d,
    DeformConv2dFunction,
    DeformConv2dPack,
)
from mmcv.ops.modulated_deform_conv import (
    ModulatedDeformConv2d,
    ModulatedDeformConv2dFunction,
    ModulatedDeformConv2dPack,
)

from ..autograd import coded_function
from ..layers import CodedLayer
from ..layers.gateway import run
from ..registry import register_layer


class _QDeformConv(CodedLayer):
    """Mixin of deformable convolutions, which keep their input as codes.

    Output and gradient of the input are exact; the gradients of weight,
    offset and modulation are linear in the input, hence unbiased. Offsets and
    modulation are kept exactly. In eval mode, without grad and at level L0 a
    layer is its parent.

    Args:
        *args: As the parent.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1 to 8. Defaults to the level's for
            convolutions, rounded down.
        group_size (int, optional): As ``QConv2d``.
        **kwargs: As the parent.
    """

    kind = 'conv'
    shares_bits = False

    def _run(self, parent, compressed, x, *others):
        parameters = (*others, self.weight, getattr(self, 'bias', None))
        return run(self, parent, compressed, (x, *others), parameters)

    def _deform(self, x, offset):
        return coded_function(
            DeformConv2dFunction,
            0,
            self.quantizer,
            x,
            offset,
            self.weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deform_groups,
            False,
            self.im2col_step,
        )

    def _deform_modulated(self, x, offset, mask):
        return coded_function(
            ModulatedDeformConv2dFunction,
            0,
            self.quantizer,
            x,
            offset,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.deform_groups,
        )


def _input(call):
    """Rule of the layers: what else torch keeps, they keep as well."""
    return (call.input,)


@register_layer(DeformConv2d, saved_by_torch=_input)
class QDeformConv2d(_QDeformConv, DeformConv2d):
    """MMCV's ``DeformConv2d`` that keeps its input as codes."""

    def forward(self, x, offset):
        """See ``DeformConv2d``."""
        parent, ours = DeformConv2d.forward, QDeformConv2d._compress
        return self._run(parent, ours, x, offset)

    def _compress(self, x, offset):
        sizes = zip(x.shape[2:], self.kernel_size)
        if any(size < kernel for size, kernel in sizes):
            # The parent pads, for the sake of some kernels.
            return DeformConv2d.forward(self, x, offset)
        return self._deform(x, offset)


@register_layer(DeformConv2dPack, saved_by_torch=_input)
class QDeformConv2dPack(_QDeformConv, DeformConv2dPack):
    """MMCV's ``DeformConv2dPack`` that keeps its input as codes."""

    def forward(self, x):
        """See ``DeformConv2dPack``."""
        parent, ours = DeformConv2dPack.forward, QDeformConv2dPack._compress
        return self._run(parent, ours, x)

    def _compress(self, x):
        return self._deform(x, self.conv_offset(x))


@register_layer(ModulatedDeformConv2d, saved_by_torch=_input)
class QModulatedDeformConv2d(_QDeformConv, ModulatedDeformConv2d):
    """MMCV's ``ModulatedDeformConv2d`` that keeps its input as codes."""

    def forward(self, x, offset, mask):
        """See ``ModulatedDeformConv2d``."""
        parent = ModulatedDeformConv2d.forward
        ours = QModulatedDeformConv2d._deform_modulated
        return self._run(parent, ours, x, offset, mask)


@register_layer(ModulatedDeformConv2dPack, saved_by_torch=_input)
class QModulatedDeformConv2dPack(_QDeformConv, ModulatedDeformConv2dPack):
    """MMCV's ``ModulatedDeformConv2dPack`` that keeps its input as codes."""

    def forward(self, x):
        """See ``ModulatedDeformConv2dPack``."""
        parent = ModulatedDeformConv2dPack.forward
        return self._run(parent, QModulatedDeformConv2dPack._compress, x)

    def _compress(self, x):
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        offset = torch.cat((first, second), dim=1)
        return self._deform_modulated(x, offset, torch.sigmoid(mask))
