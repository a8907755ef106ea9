"""Compressed layer normalisation."""

from torch import nn

from ..autograd import layer_norm
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run

_MOST_BITS = 8


@register_layer(
    nn.LayerNorm,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    names=('QLN',),
    examples=lambda: {
        'plain': (lambda: QLayerNorm(24), (3, 7, 24)),
        '2-d': (lambda: QLayerNorm((5, 8)), (3, 4, 5, 8)),
    },
)
class QLayerNorm(CodedLayer, nn.LayerNorm):
    """``nn.LayerNorm`` that keeps its normalised value as codes of few bits.

    Linear layers that read the output, also after views and permutations,
    share the codes. The output is exact. The gradients of weight and bias are
    unbiased; that of the input has a bias of second order, see
    :func:`mmactnn.autograd.layer_norm`. In eval mode, without grad and at
    level L0 it is ``nn.LayerNorm``.

    The codes have a bit more than the level's ones of normalisations, as they
    take the place of two payloads, and the noise of a linear layer's and of
    this gradient goes together. They are not adaptive.

    Args:
        *args: As ``nn.LayerNorm``.
        bits (int, optional): Bits an element of the normalised value at every
            level but L0. Valid values are 1 to 8. Defaults to one more than
            the level's for normalisations.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.LayerNorm``.

    Examples:
        >>> norm = QLayerNorm(8)
        >>> norm(torch.randn(2, 3, 8)).sum().backward()
    """

    kind = 'norm'
    shares_bits = False

    @classmethod
    def level_bits(cls, level):
        """See the base class."""
        return None if level.norm is None else min(level.norm + 1, _MOST_BITS)

    def forward(self, input):
        """See ``nn.LayerNorm``."""
        return run(
            self,
            nn.LayerNorm.forward,
            QLayerNorm._compress,
            (input,),
            (self.weight, self.bias),
        )

    def _compress(self, input):
        return layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            self.quantizer,
        )
