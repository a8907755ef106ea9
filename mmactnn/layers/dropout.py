"""Dropout that keeps no mask."""

import torch
from torch import nn

from ..autograd import dropout, feature_dropout
from ..registry import register_layer
from .base import ExactLayer
from .gateway import run


class _Dropout(ExactLayer):
    """Mixin of the layers that keep a seed instead of a mask."""

    def _draws(self, input):
        """Whether a call draws a mask."""
        # torch refuses to overwrite a leaf.
        needs_grad = torch.is_grad_enabled() and input.requires_grad
        refused = self.inplace and input.is_leaf and needs_grad
        return 0 < self.p < 1 and not refused


@register_layer(
    nn.Dropout,
    saved_by_torch=lambda call: (call.mask,),
    aliases={'mmcv.cnn.bricks.drop.Dropout': []},
    examples=lambda: {
        'plain': (lambda: QDropout(0.3), (3, 4, 7, 5)),
    },
)
class QDropout(_Dropout, nn.Dropout):
    """``nn.Dropout`` that keeps a seed instead of a mask.

    The elements are dropped independently of each other with probability p,
    rounded to a multiple of 2^-16 but below 1, and the backward pass
    regenerates the mask. The seed is drawn from torch's default generator of
    the CPU, also for tensors on the GPU: masks differ from torch's, but are
    equally reproducible under ``torch.utils.checkpoint`` and after
    ``torch.manual_seed``.

    In eval mode, with p = 0 or 1 and at level L0 it is ``nn.Dropout``. Unlike
    other layers it draws its own mask also without grad: a reentrant
    checkpoint runs a block without grad first, and the second run has to drop
    the same elements.

    Args:
        p (float, optional): Probability to drop an element. Defaults to 0.5.
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.

    Examples:
        >>> QDropout(0.1)(torch.randn(2, requires_grad=True)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Dropout``."""
        return run(
            self,
            nn.Dropout.forward,
            QDropout._compress,
            (input,),
            without_grad=True,
        )

    def _compress(self, input):
        if not self._draws(input):
            return nn.Dropout.forward(self, input)
        return dropout(input, self.p, self.inplace, self.quantizer)


@register_layer(
    nn.Dropout2d,
    saved_by_torch=lambda call: (call.mask,),
    examples=lambda: {
        'plain': (lambda: QDropout2d(0.3), (3, 4, 7, 5)),
    },
)
class QDropout2d(_Dropout, nn.Dropout2d):
    """``nn.Dropout2d`` that keeps a seed instead of a mask.

    Whole channels of samples are dropped, otherwise as in :class:`QDropout`.
    torch keeps one number a channel of a sample, which is little.

    Args:
        p (float, optional): Probability to drop a channel of a sample.
            Defaults to 0.5.
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.

    Examples:
        >>> x = torch.randn(2, 3, 4, 4, requires_grad=True)
        >>> QDropout2d(0.1)(x).sum().backward()
    """

    def forward(self, input):
        """See ``nn.Dropout2d``."""
        return run(
            self,
            nn.Dropout2d.forward,
            QDropout2d._compress,
            (input,),
            without_grad=True,
        )

    def _compress(self, input):
        # torch warns or raises for other ranks.
        if input.dim() != 4 or not self._draws(input):
            return nn.Dropout2d.forward(self, input)
        return feature_dropout(input, self.p, self.inplace, self.quantizer)
