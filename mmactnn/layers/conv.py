"""Compressed convolutions."""

import torch.nn.functional as F
from torch import nn

from ..autograd import convolution
from .base import QuantizedLayer


class QConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` that keeps its input as codes of a few bits.

    The output and the gradient of the input are exact; the gradient of the
    weight is unbiased (ActNN, arXiv:2104.14129). In eval mode, without grad
    and at level L0 it is ``nn.Conv2d``; with a frozen weight it keeps no
    input at all.

    Args:
        *args: As ``nn.Conv2d``.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1, 2, 4 and 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.Conv2d``.

    Examples:
        >>> conv = QConv2d(3, 8, 3, padding=1)
        >>> conv(torch.rand(2, 3, 16, 16)).sum().backward()
    """

    kind = 'conv'

    def __init__(self, *args, bits=None, group_size=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_quantizer(bits, group_size)

    def _conv_forward(self, input, weight, bias):
        if not (self.training and self.compresses(input, weight, bias)):
            return super()._conv_forward(input, weight, bias)
        padding = self.padding
        if self.padding_mode != 'zeros':
            input = F.pad(
                input,
                self._reversed_padding_repeated_twice,
                mode=self.padding_mode,
            )
            padding = (0,) * len(self.kernel_size)
        elif isinstance(padding, str):
            input, padding = self._resolve_padding(input)
        # As F.conv2d: a sample alone is a batch of one.
        single = input.dim() == len(self.kernel_size) + 1
        output = convolution(
            input.unsqueeze(0) if single else input,
            weight,
            bias,
            (
                self.stride,
                padding,
                self.dilation,
                False,
                (0,) * len(padding),
                self.groups,
            ),
            self.quantizer,
        )
        return output.squeeze(0) if single else output

    def _resolve_padding(self, input):
        """Padding 'same' or 'valid' as numbers, one odd side padded here."""
        if self.padding == 'valid':
            return input, (0,) * len(self.kernel_size)
        total = [
            dilation * (size - 1)
            for dilation, size in zip(self.dilation, self.kernel_size)
        ]
        extra = [side for t in reversed(total) for side in (0, t % 2)]
        if any(extra):
            input = F.pad(input, extra)
        return input, tuple(t // 2 for t in total)
