"""Compressed layer normalisation, with means and without."""

import torch
from torch import nn

from ..autograd import layer_norm, meta_tensor, rms_norm
from ..autograd.autocast import full_dtype
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run

_MOST_BITS = 8


class _NormalisedLayer(CodedLayer):
    """Mixin of normalisations whose codes are those of the output, too."""

    kind = 'norm'
    shares_bits = False

    @classmethod
    def level_bits(cls, level):
        """See the base class."""
        return None if level.norm is None else min(level.norm + 1, _MOST_BITS)


@register_layer(
    nn.LayerNorm,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    names=('QLN',),
    examples=lambda: {
        'plain': (lambda: QLayerNorm(24), (3, 7, 24)),
        '2-d': (lambda: QLayerNorm((5, 8)), (3, 4, 5, 8)),
    },
)
class QLayerNorm(_NormalisedLayer, nn.LayerNorm):
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


def takes_rms_norm(input, shape, weight):
    """Whether RMS normalisation keeps codes.

    Args:
        input (Tensor[*]): The input.
        shape (Sequence[int]): Shape of what is normalised together.
        weight (Tensor[*], optional): The scale.

    Returns:
        bool: False for a weight of another dtype, with which torch computes
        in several steps, and for shapes that do not fit, which torch refuses.
    """
    shape = tuple(shape)
    if not shape or input.shape[-len(shape) :] != shape:
        return False
    return weight is None or (
        weight.shape == shape
        and (weight.dtype == input.dtype or full_dtype(input) is not None)
    )


def _saved_by_rms_norm(call):
    input, *statistics = call.input, *call.statistics
    if input.is_cuda:
        return input, *statistics
    # Computed step by step, in float32.
    full = meta_tensor(input.shape, torch.float32)
    if input.dtype == full.dtype:
        full = input
    if call.weight is None:
        return full, *statistics
    return full, *statistics, meta_tensor(input.shape, torch.float32)


@register_layer(
    nn.RMSNorm,
    saved_by_torch=_saved_by_rms_norm,
    names=('QRMSN',),
    examples=lambda: {
        'plain': (lambda: QRMSNorm(24), (3, 7, 24)),
        '2-d': (lambda: QRMSNorm((5, 8)), (3, 4, 5, 8)),
    },
)
class QRMSNorm(_NormalisedLayer, nn.RMSNorm):
    """``nn.RMSNorm`` that keeps its normalised value as codes of few bits.

    See :class:`QLayerNorm` for arguments and behaviour.

    Examples:
        >>> norm = QRMSNorm(8)
        >>> norm(torch.randn(2, 3, 8)).sum().backward()
    """

    def forward(self, x):
        """See ``nn.RMSNorm``."""
        return run(
            self,
            nn.RMSNorm.forward,
            QRMSNorm._compress,
            (x,),
            (self.weight,),
        )

    def _compress(self, x):
        if not takes_rms_norm(x, self.normalized_shape, self.weight):
            return nn.RMSNorm.forward(self, x)
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps, self.quantizer
        )
