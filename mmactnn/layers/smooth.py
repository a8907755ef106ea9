"""Compressed smooth activations."""

import functools

from torch import nn

from ..autograd import has_joint_code, smooth, smooth_of_norm
from ..ops import Smooth
from ..registry import default_registry, register_layer
from .base import CodedLayer, ExactLayer, is_refused_in_place
from .gateway import run


class SmoothLayer(CodedLayer):
    """Mixin of the activations that keep codes for their derivative.

    The bits are not adaptive: adaptive levels weigh the noise in the
    gradients of a layer's own weights.
    """

    kind = 'act'
    shares_bits = False


class KnownFunction:
    """Mixin of the activations whose function kernels know."""

    def smooth_function(self):
        """The function, with the parameters of the layer.

        Returns:
            Smooth: What kernels compute.
        """
        raise NotImplementedError

    @property
    def shares_code(self):
        """bool: Whether one code serves it and the layers around it."""
        return has_joint_code(self.smooth_function(), self.quantizer)

    def follow_norm(self, input, codes):
        """Compute behind a normalisation, whose codes serve this layer, too.

        Args:
            input (Tensor[N, C, *]): Output of the normalisation.
            codes (NormCodes): Codes that it keeps.

        Returns:
            Tensor[N, C, *]: The output.
        """
        return smooth_of_norm(input, codes, *self._arguments())

    def _compress(self, input):
        if is_refused_in_place(self, input):
            return self._parent.forward(self, input)
        return smooth(input, *self._arguments())

    @property
    def _parent(self):
        return default_registry.entry_of(type(self)).parent

    def _arguments(self):
        return (
            functools.partial(self._parent.forward, self),
            self.smooth_function(),
            self.quantizer,
            type(self).__name__,
        )


@register_layer(
    nn.GELU,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QGELU(), (3, 4, 7, 5)),
        'tanh': (lambda: QGELU('tanh'), (3, 4, 7, 5)),
    },
)
class QGELU(KnownFunction, SmoothLayer, nn.GELU):
    """``nn.GELU`` that keeps one code of its input for two uses.

    The derivative is decoded from it, and so is the input of a convolution or
    linear layer that follows, see ``joint_act`` in
    :class:`mmactnn.Compression`. The output is exact. In eval mode, without
    grad and at level L0 it is ``nn.GELU``.

    Args:
        approximate (str, optional): ``'none'`` or ``'tanh'``. Defaults to
            ``'none'``.
        bits (int, optional): Bits a code at every level but L0. Valid values
            are 1 to 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.

    Examples:
        >>> QGELU()(torch.randn(2, 3, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.GELU``."""
        return run(self, nn.GELU.forward, QGELU._compress, (input,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.gelu(self.approximate)


@register_layer(
    nn.SiLU,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QSiLU(), (3, 4, 7, 5)),
    },
)
class QSiLU(KnownFunction, SmoothLayer, nn.SiLU):
    """``nn.SiLU`` that keeps one code of its input for two uses.

    See :class:`QGELU`. In eval mode, without grad and at level L0 it is
    ``nn.SiLU``.

    Args:
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.
        bits (int, optional): As :class:`QGELU`.
        group_size (int, optional): As :class:`QGELU`.

    Examples:
        >>> QSiLU()(torch.randn(2, 3, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.SiLU``."""
        return run(self, nn.SiLU.forward, QSiLU._compress, (input,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.silu()


@register_layer(
    nn.Mish,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QMish(), (3, 4, 7, 5)),
    },
)
class QMish(KnownFunction, SmoothLayer, nn.Mish):
    """``nn.Mish`` that keeps one code of its input for two uses.

    See :class:`QGELU`. In eval mode, without grad and at level L0 it is
    ``nn.Mish``.

    Args:
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.
        bits (int, optional): As :class:`QGELU`.
        group_size (int, optional): As :class:`QGELU`.

    Examples:
        >>> QMish()(torch.randn(2, 3, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Mish``."""
        return run(self, nn.Mish.forward, QMish._compress, (input,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.mish()


@register_layer(
    nn.Softplus,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QSoftplus(2.0), (3, 4, 7, 5)),
    },
)
class QSoftplus(KnownFunction, SmoothLayer, nn.Softplus):
    """``nn.Softplus`` that keeps one code of its input for two uses.

    See :class:`QGELU`; with a ``threshold`` below 10, where the derivative
    jumps, it keeps codes of that. In eval mode, without grad and at level L0
    it is ``nn.Softplus``.

    Args:
        beta (float, optional): Factor of the input. Defaults to 1.
        threshold (float, optional): Value of ``beta * input`` above which it
            is the identity. Defaults to 20.
        bits (int, optional): As :class:`QGELU`.
        group_size (int, optional): As :class:`QGELU`.

    Examples:
        >>> QSoftplus()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Softplus``."""
        return run(self, nn.Softplus.forward, QSoftplus._compress, (input,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.softplus(self.beta, self.threshold)


@register_layer(
    nn.Hardswish,
    names=['QHSwish'],
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QHardswish(), (3, 4, 7, 5)),
    },
)
class QHardswish(KnownFunction, SmoothLayer, nn.Hardswish):
    """``nn.Hardswish`` that keeps its derivative as codes of a few bits.

    The output is exact and the gradient unbiased. In eval mode, without grad
    and at level L0 it is ``nn.Hardswish``.

    Args:
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.
        bits (int, optional): As :class:`QGELU`.
        group_size (int, optional): Accepted as of other layers; codes of a
            derivative have no ranges.

    Examples:
        >>> QHardswish()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Hardswish``."""
        return run(self, nn.Hardswish.forward, QHardswish._compress, (input,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.hardswish()


@register_layer(
    nn.ELU,
    # In place, torch's backward pass reads the output.
    saved_by_torch=lambda call: (call.output if call.inplace else call.input,),
    examples=lambda: {
        'plain': (lambda: QELU(), (3, 4, 7, 5)),
    },
)
class QELU(KnownFunction, SmoothLayer, nn.ELU):
    """``nn.ELU`` that keeps its derivative as codes of a few bits.

    The output is exact and the gradient unbiased. In eval mode, without
    grad, at level L0, and in place with a negative ``alpha``, which torch
    cannot differentiate, it is ``nn.ELU``.

    Args:
        alpha (float, optional): Factor of the exponential. Defaults to 1.
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.
        bits (int, optional): As :class:`QGELU`.
        group_size (int, optional): As :class:`QHardswish`.

    Examples:
        >>> QELU()(torch.randn(2, 3, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.ELU``."""
        return run(self, nn.ELU.forward, QELU._compress, (input,))

    def _compress(self, input):
        if self.inplace and self.alpha < 0:
            return nn.ELU.forward(self, input)
        return super()._compress(input)

    def smooth_function(self):
        """See the base class."""
        return Smooth.elu(self.alpha)


@register_layer(
    nn.Sigmoid,
    saved_by_torch=lambda call: (call.output,),
    examples=lambda: {
        'plain': (lambda: QSigmoid(), (3, 4, 7, 5)),
    },
)
class QSigmoid(KnownFunction, SmoothLayer, nn.Sigmoid):
    """``nn.Sigmoid`` that keeps its derivative as codes of a few bits.

    The output is exact and the gradient unbiased. In eval mode, without grad
    and at level L0 it is ``nn.Sigmoid``.

    Args:
        bits (int, optional): As :class:`QGELU`.
        group_size (int, optional): As :class:`QHardswish`.

    Examples:
        >>> QSigmoid()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Sigmoid``."""
        return run(self, nn.Sigmoid.forward, QSigmoid._compress, (input,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.sigmoid()


@register_layer(
    nn.Tanh,
    saved_by_torch=lambda call: (call.output,),
    examples=lambda: {
        'plain': (lambda: QTanh(), (3, 4, 7, 5)),
    },
)
class QTanh(KnownFunction, SmoothLayer, nn.Tanh):
    """``nn.Tanh`` that keeps its derivative as codes of a few bits.

    The output is exact and the gradient unbiased. In eval mode, without grad
    and at level L0 it is ``nn.Tanh``.

    Args:
        bits (int, optional): As :class:`QGELU`.
        group_size (int, optional): As :class:`QHardswish`.

    Examples:
        >>> QTanh()(torch.randn(2, 3, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Tanh``."""
        return run(self, nn.Tanh.forward, QTanh._compress, (input,))

    def smooth_function(self):
        """See the base class."""
        return Smooth.tanh()


@register_layer(
    nn.Hardsigmoid,
    saved_by_torch=lambda call: (call.input,),
    examples=lambda: {
        'plain': (lambda: QHardsigmoid(), (3, 4, 7, 5)),
    },
)
class QHardsigmoid(KnownFunction, ExactLayer, nn.Hardsigmoid):
    """``nn.Hardsigmoid`` that keeps a mask of one bit an element. Exact.

    In eval mode, without grad and at level L0 it is ``nn.Hardsigmoid``.

    Args:
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.

    Examples:
        >>> QHardsigmoid()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    kept_bits = 1

    def forward(self, input):
        """See ``nn.Hardsigmoid``."""
        return run(
            self, nn.Hardsigmoid.forward, QHardsigmoid._compress, (input,)
        )

    def smooth_function(self):
        """See the base class."""
        return Smooth.hardsigmoid()
