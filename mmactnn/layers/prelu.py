"""Compressed rectifier with a trained slope."""

from torch import nn

from ..autograd import prelu
from ..ops.quantize import VALID_DTYPES
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run


@register_layer(
    nn.PReLU,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QPReLU(), (3, 4, 7, 5)),
        'channels': (lambda: QPReLU(4), (3, 4, 7, 5)),
    },
)
class QPReLU(CodedLayer, nn.PReLU):
    """``nn.PReLU`` that keeps a bit and a code of a few bits an element.

    Output and gradient of the input are exact, the gradient of the slope is
    unbiased. In eval mode, without grad and at level L0 it is ``nn.PReLU``.

    Args:
        num_parameters (int, optional): As ``nn.PReLU``. Defaults to 1.
        init (float, optional): As ``nn.PReLU``. Defaults to 0.25.
        bits (int, optional): Bits an element of the code at every level but
            L0. Valid values are 1 to 8. Defaults to the level's for
            convolutions, rounded down.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.

    Examples:
        >>> QPReLU()(torch.randn(2, 8, requires_grad=True)).sum().backward()
    """

    kind = 'conv'
    shares_bits = False

    def forward(self, input):
        """See ``nn.PReLU``."""
        parameters = (self.weight,)
        return run(
            self, nn.PReLU.forward, QPReLU._compress, (input,), parameters
        )

    def _compress(self, input):
        # torch raises its own errors, and broadcasts as autocast says.
        if (
            input.dim() < 2
            or input.dtype not in VALID_DTYPES
            or input.dtype != self.weight.dtype
        ):
            return nn.PReLU.forward(self, input)
        return prelu(input, self.weight, self.quantizer)
