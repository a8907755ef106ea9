"""The compressed fully connected layer."""

from torch import nn

from ..autograd import linear
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run


@register_layer(
    nn.Linear,
    saved_by_torch=lambda call: (
        call.input if call.needs_weight else None,
        call.weight if call.needs_input else None,
    ),
    aliases={'mmcv.cnn.bricks.wrappers.Linear': ['3b4375799c54bdb6']},
    examples=lambda: {
        'plain': (lambda: QLinear(9, 5), (7, 9)),
        '3-d': (lambda: QLinear(9, 5), (3, 5, 9)),
    },
)
class QLinear(CodedLayer, nn.Linear):
    """``nn.Linear`` that keeps its input as codes of a few bits.

    The output and the gradient of the input are exact; the gradient of the
    weight is unbiased (ActNN, arXiv:2104.14129). In eval mode, without grad
    and at level L0 it is ``nn.Linear``; with a frozen weight it keeps no
    input at all.

    Args:
        *args: As ``nn.Linear``.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1 to 8. Defaults to the level's
            for convolutions.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.Linear``.

    Examples:
        >>> layer = QLinear(16, 8)
        >>> layer(torch.rand(2, 5, 16)).sum().backward()
    """

    kind = 'conv'

    def forward(self, input):
        """See ``nn.Linear``."""
        return run(
            self,
            nn.Linear.forward,
            QLinear._compress,
            (input,),
            (self.weight, self.bias),
        )

    def _compress(self, input):
        return linear(input, self.weight, self.bias, self.quantizer)
