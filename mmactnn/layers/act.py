"""Compressed rectifiers."""

from torch import nn

from ..autograd import relu, relu_codes
from ..ops.quantize import VALID_DTYPES
from ..registry import register_layer
from .base import ExactLayer, is_refused_in_place
from .gateway import run


class _Rectifier(ExactLayer):
    """Mixin of the activations that keep a mask of one bit an element."""

    kept_bits = 1

    def _rectify(self, input):
        return relu(input, self.inplace, self.quantizer, **self._arguments())

    def _arguments(self):
        """Arguments that make :func:`mmactnn.autograd.relu` this layer."""
        return {}


@register_layer(
    nn.ReLU,
    saved_by_torch=lambda call: (call.output,),
    examples=lambda: {
        'plain': (lambda: QReLU(), (3, 4, 7, 5)),
        'in place': (lambda: QReLU(inplace=True), (3, 4, 7, 5)),
    },
)
class QReLU(_Rectifier, nn.ReLU):
    """``nn.ReLU`` that keeps a mask of one bit an element. Exact.

    Right behind a convolution, in a fused block, it keeps codes of its output
    instead, which the layers that read it share. In eval mode, without grad
    and at level L0 it is ``nn.ReLU``.

    Args:
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.

    Examples:
        >>> QReLU()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    @property
    def is_coded(self):
        """bool: Whether it keeps codes of its output in place of a mask."""
        bits = self.quantizer.bits
        return bits is not None and bits > self.kept_bits

    def forward(self, input):
        """See ``nn.ReLU``."""
        return run(self, nn.ReLU.forward, QReLU._rectify, (input,))

    def _rectify(self, input):
        if is_refused_in_place(self, input):
            return nn.ReLU.forward(self, input)
        if self.inplace:
            payload = self.quantizer.cache.get(input)
            if payload is not None and payload.rectified:
                return input  # ReLU of ReLU
        if self.is_coded and input.dim() and input.dtype in VALID_DTYPES:
            return relu_codes(input, self.inplace, self.quantizer)
        return super()._rectify(input)


@register_layer(
    nn.ReLU6,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QReLU6(), (3, 4, 7, 5)),
    },
)
class QReLU6(_Rectifier, nn.ReLU6):
    """``nn.ReLU6`` that keeps a mask of one bit an element. Exact.

    In eval mode, without grad and at level L0 it is ``nn.ReLU6``. The
    gradient of NaN passes, as on CUDA in torch; on CPU torch itself lets it
    pass or not, by the place of the element.

    Args:
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.

    Examples:
        >>> QReLU6()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.ReLU6``."""
        return run(self, nn.ReLU6.forward, QReLU6._rectify, (input,))

    def _rectify(self, input):
        if is_refused_in_place(self, input):
            return nn.ReLU6.forward(self, input)
        return super()._rectify(input)

    def _arguments(self):
        return dict(max=self.max_val)


@register_layer(
    nn.LeakyReLU,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QLeakyReLU(0.2), (3, 4, 7, 5)),
    },
)
class QLeakyReLU(_Rectifier, nn.LeakyReLU):
    """``nn.LeakyReLU`` that keeps a mask of one bit an element. Exact.

    In eval mode, without grad, at level L0, and in place with a negative
    slope, which torch cannot differentiate, it is ``nn.LeakyReLU``.

    Args:
        negative_slope (float, optional): Slope below 0. Defaults to 0.01.
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.

    Examples:
        >>> QLeakyReLU()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    @classmethod
    def rule_bits(cls, rule):
        """One bit, or None for exact; see the base class."""
        return None if rule.bits is None else 1

    def forward(self, input):
        """See ``nn.LeakyReLU``."""
        return run(self, nn.LeakyReLU.forward, QLeakyReLU._rectify, (input,))

    def _rectify(self, input):
        undefined = self.inplace and self.negative_slope < 0
        if undefined or is_refused_in_place(self, input):
            return nn.LeakyReLU.forward(self, input)
        return super()._rectify(input)

    def _arguments(self):
        return dict(slope=self.negative_slope)
