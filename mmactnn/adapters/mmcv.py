"""Layers for MMCV, imported once a model has one of its classes."""

from mmcv.cnn.bricks.hsigmoid import HSigmoid
from mmcv.cnn.bricks.swish import Swish

from ..autograd import meta_tensor, smooth
from ..layers import ExactLayer, SmoothLayer
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
