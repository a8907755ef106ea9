"""Compressed group normalisation."""

from torch import nn

from ..autograd import group_norm
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run


@register_layer(
    nn.GroupNorm,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    names=('QGN',),
    examples=lambda: {
        'plain': (lambda: QGroupNorm(2, 6), (3, 6, 9, 5)),
        '3-d': (lambda: QGroupNorm(3, 6), (3, 6, 17)),
    },
)
class QGroupNorm(CodedLayer, nn.GroupNorm):
    """``nn.GroupNorm`` that keeps its input as codes of a few bits.

    The output is exact. The gradients of weight and bias are unbiased; that of
    the input has a bias of second order, see
    :func:`mmactnn.autograd.group_norm`. In eval mode, without grad and at
    level L0 it is ``nn.GroupNorm``.

    Args:
        *args: As ``nn.GroupNorm``; or the number of channels alone, beside
            ``num_groups`` as a keyword, as MMCV builds norms.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1 to 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range, which are not
            those of a group of channels. Valid values are 64, 128, 256 and
            512. Defaults to the model's, which is 256 unless the conversion
            says otherwise.
        **kwargs: As ``nn.GroupNorm``.

    Examples:
        >>> norm = QGroupNorm(2, 8)
        >>> norm(torch.randn(2, 8, 4, 4)).sum().backward()
    """

    kind = 'norm'

    def __init__(self, *args, bits=None, group_size=None, **kwargs):
        if len(args) == 1 and 'num_groups' in kwargs:
            # For torch this would be num_groups twice, so it is unambiguous.
            kwargs.setdefault('num_channels', args[0])
            args = args[1:]
        super().__init__(*args, bits=bits, group_size=group_size, **kwargs)

    def forward(self, input):
        """See ``nn.GroupNorm``."""
        return run(
            self,
            nn.GroupNorm.forward,
            QGroupNorm._compress,
            (input,),
            (self.weight, self.bias),
        )

    def _compress(self, input):
        if self._is_refused(input):
            return nn.GroupNorm.forward(self, input)
        return group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            self.quantizer,
        )

    def _is_refused(self, input):
        """Whether torch's layer raises for this shape."""
        return (
            input.dim() < 2
            or input.size(1) % self.num_groups != 0
            or input.numel() == self.num_groups  # one value a group
        )
