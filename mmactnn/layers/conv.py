"""Compressed convolutions."""

import torch.nn.functional as F
from torch import nn

from ..autograd import convolution, derived_convolution
from ..autograd.autocast import lower_dtype
from ..modules.execution import ORDINARY, is_leaf_of_trace, record_leaf
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run


def numeric_padding(input, padding, kernel_size, dilation):
    """Numeric padding for 'same' or 'valid', which pads an odd side itself.

    Args:
        input (Tensor[N, C, *]): Input of a convolution with stride 1.
        padding (str): 'same' or 'valid'.
        kernel_size (Sequence[int]): Size of the kernel.
        dilation (Sequence[int]): Distance of the kernel's places.

    Returns:
        tuple[Tensor[N, C, *], tuple[int]]: The input, padded where the two
        sides differ, and the padding of both sides of each dimension.
    """
    if padding == 'valid':
        return input, (0,) * len(kernel_size)
    total = [
        distance * (size - 1) for distance, size in zip(dilation, kernel_size)
    ]
    extra = [side for t in reversed(total) for side in (0, t % 2)]
    if any(extra):
        input = F.pad(input, extra)
    return input, tuple(t // 2 for t in total)


class _QConv(CodedLayer):
    """Mixin of convolutions, transposed or not, of all ranks."""

    kind = 'conv'

    @property
    def geometry(self):
        """tuple: Geometry as ``torch.ops.aten.convolution`` takes it.

        Only valid for numeric padding with zeros.
        """
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )


class ForwardConv(_QConv):
    """Mixin of convolutions that are not transposed."""

    # Convolves with numeric padding by zeros.
    _convolve = staticmethod(convolution)

    def _compress(self, input, weight, bias):
        rank = input.dim() - len(self.kernel_size)
        if rank == 1:
            # As in torch, a single sample is a batch of one.
            batch = input.unsqueeze(0)
            return self._compress(batch, weight, bias).squeeze(0)
        if rank != 2 or (
            input.dtype != weight.dtype and lower_dtype(input) is None
        ):
            # torch's function raises its own errors.
            return self.torch_class()._conv_forward(self, input, weight, bias)
        padding = self.padding
        if self.padding_mode != 'zeros':
            input = F.pad(
                input,
                self._reversed_padding_repeated_twice,
                mode=self.padding_mode,
            )
            padding = (0,) * len(self.kernel_size)
        elif isinstance(padding, str):
            input, padding = numeric_padding(
                input, padding, self.kernel_size, self.dilation
            )
        geometry = (
            self.stride,
            padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return self._convolve(input, weight, bias, geometry, self.quantizer)


@register_layer(
    nn.Conv1d,
    saved_by_torch=lambda call: (call.input, call.weight),
    examples=lambda: {
        'plain': (lambda: QConv1d(4, 8, 3), (3, 4, 7)),
        'same': (
            lambda: QConv1d(4, 8, 3, padding='same', dilation=2),
            (3, 4, 7),
        ),
        'circular': (
            lambda: QConv1d(4, 8, 3, padding=1, padding_mode='circular'),
            (3, 4, 7),
        ),
        'groups': (
            lambda: QConv1d(4, 8, 3, padding=1, groups=2, bias=False),
            (3, 4, 7),
        ),
    },
)
class QConv1d(ForwardConv, nn.Conv1d):
    """``nn.Conv1d`` that keeps its input as codes of a few bits.

    See :class:`QConv2d` for arguments and behaviour.

    Examples:
        >>> conv = QConv1d(3, 8, 3, padding=1)
        >>> conv(torch.rand(2, 3, 16)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Conv1d``."""
        if type(input) not in ORDINARY and is_leaf_of_trace(self, input):
            return record_leaf(self, (input,))
        return nn.Conv1d.forward(self, input)

    def _conv_forward(self, input, weight, bias):
        return run(
            self,
            nn.Conv1d._conv_forward,
            QConv1d._compress,
            (input, weight, bias),
            (weight, bias),
        )


@register_layer(
    nn.Conv2d,
    saved_by_torch=lambda call: (call.input, call.weight),
    names=('QConv',),
    aliases={'mmcv.cnn.bricks.wrappers.Conv2d': ['1c6b0dc9d0ce9194']},
    examples=lambda: {
        'plain': (lambda: QConv2d(4, 8, 3), (3, 4, 7, 5)),
        'same': (
            lambda: QConv2d(4, 8, 3, padding='same', dilation=2),
            (3, 4, 7, 5),
        ),
        'circular': (
            lambda: QConv2d(4, 8, 3, padding=1, padding_mode='circular'),
            (3, 4, 7, 5),
        ),
        'groups': (
            lambda: QConv2d(4, 8, 3, padding=1, groups=2, bias=False),
            (3, 4, 7, 5),
        ),
    },
)
class QConv2d(ForwardConv, nn.Conv2d):
    """``nn.Conv2d`` that keeps its input as codes of a few bits.

    The output and the gradient of the input are exact; the gradient of the
    weight is unbiased (ActNN, arXiv:2104.14129). In eval mode, without grad
    and at level L0 it is ``nn.Conv2d``; with a frozen weight it keeps no
    input at all.

    Args:
        *args: As ``nn.Conv2d``.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1 to 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.Conv2d``.

    Examples:
        >>> conv = QConv2d(3, 8, 3, padding=1)
        >>> conv(torch.rand(2, 3, 16, 16)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Conv2d``."""
        if type(input) not in ORDINARY and is_leaf_of_trace(self, input):
            return record_leaf(self, (input,))
        return nn.Conv2d.forward(self, input)

    def _conv_forward(self, input, weight, bias):
        return run(
            self,
            nn.Conv2d._conv_forward,
            QConv2d._compress,
            (input, weight, bias),
            (weight, bias),
        )


@register_layer(
    nn.Conv3d,
    saved_by_torch=lambda call: (call.input, call.weight),
    aliases={'mmcv.cnn.bricks.wrappers.Conv3d': ['eec7ca886566f8e9']},
    examples=lambda: {
        'plain': (lambda: QConv3d(4, 8, 3), (3, 4, 7, 5, 6)),
        'same': (
            lambda: QConv3d(4, 8, 3, padding='same', dilation=2),
            (3, 4, 7, 5, 6),
        ),
        'circular': (
            lambda: QConv3d(4, 8, 3, padding=1, padding_mode='circular'),
            (3, 4, 7, 5, 6),
        ),
        'groups': (
            lambda: QConv3d(4, 8, 3, padding=1, groups=2, bias=False),
            (3, 4, 7, 5, 6),
        ),
    },
)
class QConv3d(ForwardConv, nn.Conv3d):
    """``nn.Conv3d`` that keeps its input as codes of a few bits.

    See :class:`QConv2d` for arguments and behaviour.

    Examples:
        >>> conv = QConv3d(3, 8, 3, padding=1)
        >>> conv(torch.rand(2, 3, 4, 8, 8)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Conv3d``."""
        if type(input) not in ORDINARY and is_leaf_of_trace(self, input):
            return record_leaf(self, (input,))
        return nn.Conv3d.forward(self, input)

    def _conv_forward(self, input, weight, bias):
        return run(
            self,
            nn.Conv3d._conv_forward,
            QConv3d._compress,
            (input, weight, bias),
            (weight, bias),
        )


class DerivedConv(ForwardConv):
    """Mixin of convolutions with a weight computed from the parameter.

    Subclasses name the computation; it runs again in the backward pass, so
    that nothing of it is kept.
    """

    def derive_weight(self, weight):
        """Compute the weight.

        Args:
            weight (Tensor[O, C / groups, *]): The parameter.

        Returns:
            Tensor[O, C / groups, *]: The weight of the convolution.

        Raises:
            NotImplementedError: If the subclass does not define it.
        """
        raise NotImplementedError

    def _convolve(self, input, weight, bias, geometry, quantizer):
        return derived_convolution(
            input, bias, self.derive_weight, geometry, quantizer, weight
        )


class _QTransposedConv(_QConv):
    def _compress(self, input, output_size=None):
        weight, bias = self.weight, self.bias
        rank = input.dim() - len(self.kernel_size)
        if rank not in (1, 2) or (
            input.dtype != weight.dtype and lower_dtype(input) is None
        ):
            return self.torch_class().forward(self, input, output_size)
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        geometry = (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            output_padding,
            self.groups,
        )
        batch = input.unsqueeze(0) if rank == 1 else input
        output = convolution(batch, weight, bias, geometry, self.quantizer)
        return output.squeeze(0) if rank == 1 else output


@register_layer(
    nn.ConvTranspose1d,
    saved_by_torch=lambda call: (call.input, call.weight),
    examples=lambda: {
        'plain': (lambda: QConvTranspose1d(4, 8, 3), (3, 4, 7)),
        'output padding': (
            lambda: QConvTranspose1d(4, 8, 3, stride=2, output_padding=1),
            (3, 4, 7),
        ),
    },
)
class QConvTranspose1d(_QTransposedConv, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` that keeps its input as codes of a few bits.

    See :class:`QConv2d` for arguments and behaviour.

    Examples:
        >>> conv = QConvTranspose1d(8, 3, 2, stride=2)
        >>> conv(torch.rand(2, 8, 16)).sum().backward()
    """

    def forward(self, input, output_size=None):
        """See :meth:`QConvTranspose2d.forward`."""
        return run(
            self,
            nn.ConvTranspose1d.forward,
            QConvTranspose1d._compress,
            (input, output_size),
            (self.weight, self.bias),
        )


@register_layer(
    nn.ConvTranspose2d,
    saved_by_torch=lambda call: (call.input, call.weight),
    aliases={'mmcv.cnn.bricks.wrappers.ConvTranspose2d': ['4ff4f363d0c30a95']},
    examples=lambda: {
        'plain': (lambda: QConvTranspose2d(4, 8, 3), (3, 4, 7, 5)),
        'output padding': (
            lambda: QConvTranspose2d(4, 8, 3, stride=2, output_padding=1),
            (3, 4, 7, 5),
        ),
    },
)
class QConvTranspose2d(_QTransposedConv, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that keeps its input as codes of a few bits.

    See :class:`QConv2d` for arguments and behaviour.

    Examples:
        >>> conv = QConvTranspose2d(8, 3, 2, stride=2)
        >>> conv(torch.rand(2, 8, 16, 16)).sum().backward()
    """

    def forward(self, input, output_size=None):
        """See ``nn.ConvTranspose2d``.

        Args:
            input (Tensor[N, C, *]): Input, or a single sample Tensor[C, *].
            output_size (Sequence[int], optional): Size of the output where
                the stride leaves a choice, with or without N and C. Defaults
                to that of ``output_padding``.

        Returns:
            Tensor[N, O, *]: The output.

        Raises:
            ValueError: If there is no output of that size.
            RuntimeError: As torch's layer, for invalid inputs.
        """
        return run(
            self,
            nn.ConvTranspose2d.forward,
            QConvTranspose2d._compress,
            (input, output_size),
            (self.weight, self.bias),
        )


@register_layer(
    nn.ConvTranspose3d,
    saved_by_torch=lambda call: (call.input, call.weight),
    aliases={'mmcv.cnn.bricks.wrappers.ConvTranspose3d': ['072a9d3247bb112c']},
    examples=lambda: {
        'plain': (lambda: QConvTranspose3d(4, 8, 3), (3, 4, 7, 5, 6)),
        'output padding': (
            lambda: QConvTranspose3d(4, 8, 3, stride=2, output_padding=1),
            (3, 4, 7, 5, 6),
        ),
    },
)
class QConvTranspose3d(_QTransposedConv, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` that keeps its input as codes of a few bits.

    See :class:`QConv2d` for arguments and behaviour.

    Examples:
        >>> conv = QConvTranspose3d(8, 3, 2, stride=2)
        >>> conv(torch.rand(2, 8, 4, 8, 8)).sum().backward()
    """

    def forward(self, input, output_size=None):
        """See :meth:`QConvTranspose2d.forward`."""
        return run(
            self,
            nn.ConvTranspose3d.forward,
            QConvTranspose3d._compress,
            (input, output_size),
            (self.weight, self.bias),
        )
