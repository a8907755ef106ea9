"""Compressed pooling."""

import math

from torch import nn

from ..autograd import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from ..ops import as_pair
from ..registry import register_layer
from .base import ExactLayer
from .gateway import run

# As 8 bits hold a position.
MAX_TAPS = 256


@register_layer(
    nn.MaxPool2d,
    saved_by_torch=lambda call: (call.input, call.indices),
    aliases={'mmcv.cnn.bricks.wrappers.MaxPool2d': ['617c064cb56bd535']},
    examples=lambda: {
        'plain': (lambda: QMaxPool2d(3, 2, 1), (3, 4, 7, 5)),
    },
)
class QMaxPool2d(ExactLayer, nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps 4 bits an output. Exact.

    It keeps the position of the maximum inside of its window, in 8 bits where
    that has more than 16 taps; torch keeps the input and 64 bits an output.
    Output and gradient are torch's; where windows of up to 16 taps overlap,
    gradients are summed in float32.

    In eval mode, without grad, at level L0, for windows of more than 256 taps
    and with ``return_indices`` it is ``nn.MaxPool2d``. Its ``repr`` and the
    report of a conversion show the last two cases.

    Args:
        *args: As ``nn.MaxPool2d``.
        **kwargs: As ``nn.MaxPool2d``.

    Examples:
        >>> pool = QMaxPool2d(3, stride=2, padding=1)
        >>> x = torch.randn(2, 8, 16, 16, requires_grad=True)
        >>> pool(x).sum().backward()
    """

    kept_bits = 4

    @staticmethod
    def why_exact(module):
        """See the base class."""
        if module.return_indices:
            return 'returns the indices, which take more than 4 bits'
        taps = math.prod(as_pair(module.kernel_size))
        if taps > MAX_TAPS:
            return f'window of {taps} taps, {MAX_TAPS} at most'
        return None

    def forward(self, input):
        """See ``nn.MaxPool2d``."""
        return run(self, nn.MaxPool2d.forward, QMaxPool2d._compress, (input,))

    def _compress(self, input):
        if self.why_exact(self) is not None:
            return nn.MaxPool2d.forward(self, input)
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.quantizer,
        )


@register_layer(
    nn.AvgPool2d,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QAvgPool2d(2), (3, 4, 7, 5)),
    },
)
class QAvgPool2d(ExactLayer, nn.AvgPool2d):
    """``nn.AvgPool2d`` that keeps no tensor. Exact.

    torch keeps the input, though the gradient only needs its shape.
    In eval mode, without grad and at level L0 it is ``nn.AvgPool2d``.

    Args:
        *args: As ``nn.AvgPool2d``.
        **kwargs: As ``nn.AvgPool2d``.

    Examples:
        >>> x = torch.randn(2, 8, 16, 16, requires_grad=True)
        >>> QAvgPool2d(2)(x).sum().backward()
    """

    def forward(self, input):
        """See ``nn.AvgPool2d``."""
        return run(self, nn.AvgPool2d.forward, QAvgPool2d._compress, (input,))

    def _compress(self, input):
        return avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
            self.quantizer,
        )


@register_layer(
    nn.AdaptiveAvgPool2d,
    saved_by_torch=lambda call: (call.input,),
    aliases={
        'mmdet.models.layers.brick_wrappers.AdaptiveAvgPool2d': [
            'bb1f4e61c9a94e0f'
        ]
    },
    examples=lambda: {
        'plain': (lambda: QAdaptiveAvgPool2d(2), (3, 4, 7, 5)),
    },
)
class QAdaptiveAvgPool2d(ExactLayer, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` that keeps no tensor. Exact.

    torch keeps the input, though the gradient only needs its shape.
    In eval mode, without grad, at level L0 and for an output of one pixel,
    which torch computes as a mean and keeps nothing for, it is
    ``nn.AdaptiveAvgPool2d``.

    Args:
        *args: As ``nn.AdaptiveAvgPool2d``.
        **kwargs: As ``nn.AdaptiveAvgPool2d``.

    Examples:
        >>> x = torch.randn(2, 8, 16, 16, requires_grad=True)
        >>> QAdaptiveAvgPool2d(4)(x).sum().backward()
    """

    @staticmethod
    def why_exact(module):
        """See the base class."""
        one_pixel = as_pair(module.output_size) == (1, 1)
        return 'keeps nothing' if one_pixel else None

    def forward(self, input):
        """See ``nn.AdaptiveAvgPool2d``."""
        return run(
            self,
            nn.AdaptiveAvgPool2d.forward,
            QAdaptiveAvgPool2d._compress,
            (input,),
        )

    def _compress(self, input):
        if self.why_exact(self) is not None:
            return nn.AdaptiveAvgPool2d.forward(self, input)
        return adaptive_avg_pool2d(input, self.output_size, self.quantizer)
