"""Layers for MMCV, imported once a model has one of its classes."""

from mmcv.cnn.bricks.swish import Swish

from ..autograd import silu
from ..layers import SmoothLayer
from ..layers.gateway import run
from ..registry import register_layer


@register_layer(Swish, saved_by_torch=lambda call: (call.input, call.sigmoid))
class QSwish(SmoothLayer, Swish):
    """MMCV's ``Swish`` that keeps its derivative as codes of a few bits.

    It differs from :class:`QSiLU` in the last bits of the output. In eval
    mode, without grad and at level L0 it is ``Swish``.

    Args:
        bits (int, optional): As ``QSiLU``.
        group_size (int, optional): As ``QSiLU``.
    """

    def forward(self, x):
        """See ``Swish``."""
        return run(self, Swish.forward, QSwish._compress, (x,))

    def _compress(self, x):
        return silu(x, self.quantizer, composed=True)
