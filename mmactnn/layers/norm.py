"""Compressed batch normalisation."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd import batch_norm
from .base import QuantizedLayer


class QBatchNorm(QuantizedLayer, _BatchNorm):
    """Batch normalisation of any rank that keeps its input as codes.

    Forward as torch's. The gradients of weight and bias are unbiased. With
    running statistics (``norm_eval=True`` in OpenMMLab's backbones) the
    gradient of the input is exact, and the input is kept, as codes, only for
    a trainable weight. Without grad and at level L0 it is torch's layer.

    Args:
        *args: As ``nn.BatchNorm2d``.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1, 2, 4 and 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.BatchNorm2d``.
    """

    kind = 'norm'

    def __init__(self, *args, bits=None, group_size=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._init_quantizer(bits, group_size)

    def _check_input_dim(self, input):
        """Accept every rank that has channels."""
        if input.dim() < 2:
            raise ValueError(
                f'expected an input of 2 dimensions or more, got {input.dim()}'
            )

    def forward(self, input):
        """See ``nn.BatchNorm2d``."""
        if not self.compresses(input, self.weight, self.bias):
            return super().forward(input)
        self._check_input_dim(input)
        momentum = self._next_momentum()
        batch_stats = self.training or self.running_mean is None
        if batch_stats:
            _check_more_than_one_value(input)
        # The buffers are neither read nor written where torch's layer
        # passes None in their place.
        used = not self.training or self.track_running_stats
        return batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean if used else None,
            self.running_var if used else None,
            batch_stats,
            momentum,
            self.eps,
            self.quantizer,
        )

    def _next_momentum(self):
        """The weight of this batch; counts it if the layer tracks."""
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


def _check_more_than_one_value(input):
    values = input.numel() // max(input.size(1), 1)
    if values == 1:
        raise ValueError(
            'Expected more than 1 value per channel when '
            f'training, got input size {input.size()}'
        )


class QBatchNorm2d(QBatchNorm, nn.BatchNorm2d, _BatchNorm):
    """``nn.BatchNorm2d`` that keeps its input as codes of a few bits.

    See :class:`QBatchNorm` for arguments and behaviour.

    Examples:
        >>> norm = QBatchNorm2d(8)
        >>> norm(torch.randn(2, 8, 4, 4)).sum().backward()
    """

    # ``_BatchNorm`` is named as a direct base once more because MMEngine's
    # ``init_cfg=dict(layer='_BatchNorm')`` looks no further than those.

    def _check_input_dim(self, input):
        nn.BatchNorm2d._check_input_dim(self, input)
