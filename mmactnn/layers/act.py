"""Compressed activations."""

from torch import nn

from ..autograd import relu
from .base import QuantizedLayer


class QReLU(QuantizedLayer, nn.ReLU):
    """``nn.ReLU`` that keeps a mask of one bit an element. Exact.

    In eval mode, without grad and at level L0 it is ``nn.ReLU``.

    Args:
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.

    Examples:
        >>> QReLU()(torch.randn(2, requires_grad=True)).sum().backward()
    """

    kind = 'mask'

    def __init__(self, inplace=False):
        super().__init__(inplace)
        self._init_quantizer(None, None)

    @classmethod
    def level_bits(cls, level):
        """One bit, or None for exact; see the base class."""
        return 1 if level.mask else None

    @classmethod
    def rule_bits(cls, rule):
        """One bit, or None for exact; see the base class."""
        return None if rule.bits is None else 1

    def forward(self, input):
        """See ``nn.ReLU``."""
        # torch refuses to overwrite a leaf, and does so before it writes.
        refused = self.inplace and input.is_leaf and input.requires_grad
        if refused or not (self.training and self.compresses(input)):
            return super().forward(input)
        return relu(input, self.inplace, self.quantizer)
