"""Layers for MMCV, imported once a model has one of its classes."""

import importlib.util
import math

import torch.nn.functional as F
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks.hsigmoid import HSigmoid
from mmcv.cnn.bricks.swish import Swish

from ..autograd import meta_tensor, smooth
from ..layers import ExactLayer, SmoothLayer
from ..layers.conv import DerivedConv, ForwardConv
from ..layers.gateway import run
from ..layers.smooth import KnownFunction
from ..ops import Smooth
from ..registry import register_layer


def _like_input(call):
    """A value between input and output that MMCV's layers compute."""
    return meta_tensor(call.input.shape, call.input.dtype)


@register_layer(
    Swish, saved_by_torch=lambda call: (call.input, _like_input(call))
)
class QSwish(KnownFunction, SmoothLayer, Swish):
    """MMCV's ``Swish`` that keeps one code of its input for two uses.

    It differs from :class:`QSiLU` in the last bits of the output. In eval
    mode, without grad and at level L0 it is ``Swish``.

    Args:
        bits (int, optional): As ``QSiLU``.
        group_size (int, optional): As ``QSiLU``.
    """

    def forward(self, x):
        """See ``Swish``."""
        return run(self, Swish.forward, QSwish._compress, (x,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.silu()


@register_layer(HSigmoid, saved_by_torch=lambda call: (call.input,))
class QHSigmoid(KnownFunction, ExactLayer, HSigmoid):
    """MMCV's ``HSigmoid`` that keeps a mask of one bit an element. Exact.

    In eval mode, without grad and at level L0 it is ``HSigmoid``.

    Args:
        bias (float, optional): As ``HSigmoid``.
        divisor (float, optional): As ``HSigmoid``.
        min_value (float, optional): As ``HSigmoid``.
        max_value (float, optional): As ``HSigmoid``.
    """

    kept_bits = 1

    def forward(self, x):
        """See ``HSigmoid``."""
        return run(self, HSigmoid.forward, QHSigmoid._compress, (x,))

    def _compress(self, x):
        # Only the clamping keeps a tensor.
        return smooth(
            (x + self.bias) / self.divisor,
            lambda y: y.clamp_(self.min_value, self.max_value),
            Smooth.clamp(self.min_value, self.max_value),
            self.quantizer,
            type(self).__name__,
        )


# Both keep the input, the weight that they compute, and the one before.
def _saved_with_derived_weight(call):
    before = meta_tensor(call.weight.shape, call.weight.dtype)
    return (call.input, call.weight, before)


@register_layer(ConvWS2d, saved_by_torch=_saved_with_derived_weight)
class QConvWS2d(DerivedConv, ConvWS2d):
    """MMCV's ``ConvWS2d`` that keeps its input as codes of a few bits.

    The standardised weight is computed again in the backward pass. Output and
    gradient of the input are exact, the weight's gradient is unbiased. In
    eval mode, without grad and at level L0 it is ``ConvWS2d``.

    Args:
        *args: As ``ConvWS2d``.
        bits (int, optional): As ``QConv2d``.
        group_size (int, optional): As ``QConv2d``.
        **kwargs: As ``ConvWS2d``.
    """

    def forward(self, x):
        """See ``ConvWS2d``."""
        return _run_conv(self, ConvWS2d, QConvWS2d, x)

    def derive_weight(self, weight):
        """See the base class."""
        rows = weight.size(0)
        flat = weight.view(rows, -1)
        mean = flat.mean(dim=1, keepdim=True).view(rows, 1, 1, 1)
        std = flat.std(dim=1, keepdim=True).view(rows, 1, 1, 1)
        return (weight - mean) / (std + self.eps)

    def _convolve_input(self, x):
        return self._compress(x, self.weight, self.bias)


@register_layer(ConvAWS2d, saved_by_torch=_saved_with_derived_weight)
class QConvAWS2d(DerivedConv, ConvAWS2d):
    """MMCV's ``ConvAWS2d`` that keeps its input as codes of a few bits.

    See :class:`QConvWS2d`.

    Args:
        *args: As ``ConvAWS2d``.
        bits (int, optional): As ``QConv2d``.
        group_size (int, optional): As ``QConv2d``.
        **kwargs: As ``ConvAWS2d``.
    """

    def forward(self, x):
        """See ``ConvAWS2d``."""
        return _run_conv(self, ConvAWS2d, QConvAWS2d, x)

    def derive_weight(self, weight):
        """See the base class."""
        return self._get_weight(weight)

    def _convolve_input(self, x):
        return self._compress(x, self.weight, self.bias)


@register_layer(
    Conv2dAdaptivePadding,
    saved_by_torch=lambda call: (call.input, call.weight),
)
class QConv2dAdaptivePadding(ForwardConv, Conv2dAdaptivePadding):
    """MMCV's ``Conv2dAdaptivePadding`` that keeps its input as codes.

    See :class:`QConv2d`.

    Args:
        *args: As ``Conv2dAdaptivePadding``.
        bits (int, optional): As ``QConv2d``.
        group_size (int, optional): As ``QConv2d``.
        **kwargs: As ``Conv2dAdaptivePadding``.
    """

    def forward(self, x):
        """See ``Conv2dAdaptivePadding``."""
        cls = Conv2dAdaptivePadding
        return _run_conv(self, cls, QConv2dAdaptivePadding, x)

    def _convolve_input(self, x):
        sides = []
        for axis in (-1, -2):
            size, stride = x.size(axis), self.stride[axis]
            extent = (self.weight.size(axis) - 1) * self.dilation[axis] + 1
            total = (math.ceil(size / stride) - 1) * stride + extent - size
            total = max(total, 0)
            sides += [total // 2, total - total // 2]
        if any(sides):
            x = F.pad(x, sides)
        return self._compress(x, self.weight, self.bias)


def _run_conv(layer, parent, cls, x):
    """Run a convolution whose parent's ``forward`` calls a function."""
    return run(
        layer,
        parent.forward,
        cls._convolve_input,
        (x,),
        (layer.weight, layer.bias),
    )


# MMCV also comes without ops.
if importlib.util.find_spec('mmcv._ext') is not None:
    importlib.import_module('mmactnn.adapters.mmcv_ops')
