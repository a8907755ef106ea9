"""Compressed batch normalisation."""

import math
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd import batch_norm, norm_act, norm_for_smooth
from ..ops import MAX_FROZEN_CHANNELS, NormSettings, frozen_norm_act_
from ..ops.quantize import VALID_DTYPES
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run

_STATISTICS = itemgetter('running_mean', 'running_var', 'num_batches_tracked')

# Fewest values of a channel in its statistics for which codes are kept. The
# gradient of a normalisation of a few values is small by cancellation, which
# codes disturb: at 2 bits the error is 134 times the gradient with 2 values,
# 12 times with 4, 0.7 with 8 and 0.27 with 16. Such tensors are small.
_MIN_VALUES = 16


class Fusing(NamedTuple):
    """Mode of a normalisation within a fused block.

    It then keeps codes of the normalised value.

    Attributes:
        relu (bool): Whether ReLU follows.
        inplace (bool): Whether the output may overwrite the input.
    """

    relu: bool
    inplace: bool


class _QBatchNorm(CodedLayer, _BatchNorm):
    """Batch normalisation of the rank that ``_check_input_dim`` accepts."""

    kind = 'norm'
    keeps_codes_frozen = True

    def fuses(self, input, residual=None):
        """Whether :meth:`norm_act` can take a call.

        Args:
            input (Tensor[*]): Input of the layer.
            residual (Tensor[*], optional): Added to the normalised input.
        """
        if self.quantizer.fused_bits is None or not self.compresses(
            input, self.weight, self.bias, residual
        ):
            return False
        same = residual is None or (
            residual.shape == input.shape
            and residual.dtype == input.dtype
            and residual.device == input.device
        )
        fits = input.numel() > 0 and input.dtype in VALID_DTYPES
        return same and fits and self.takes_size(input.shape)

    def takes_size(self, size):
        """Whether codes will do for an input of some shape.

        Not with statistics of a few values, nor where torch's layer raises.

        Args:
            size (Sequence[int]): Its shape; not empty.
        """
        return not self.uses_batch_stats() or (
            self.eps > 0
            and (
                math.prod(size) >= _MIN_VALUES * size[1]
                or self.stats_group() is not None
            )
        )

    def norm_act(self, input, fusing, residual=None):
        """Normalise with optional addition and ReLU, fused.

        Args:
            input (Tensor[N, C, *]): Input of the layer; see :meth:`fuses`.
            fusing (Fusing): Mode.
            residual (Tensor[N, C, *], optional): Added before the ReLU.

        Returns:
            Tensor[N, C, *]: The output.
        """
        self._check_input_dim(input)
        return norm_act(
            input,
            residual,
            self.weight,
            self.bias,
            self.next_settings(),
            fusing.relu,
            self.quantizer,
            self.stats_group(),
            fusing.inplace,
        )

    def norm_smooth(self, input, act, inplace):
        """Normalise and apply a smooth activation, with one code for both.

        Args:
            input (Tensor[N, C, *]): Input of the layer; see :meth:`fuses`.
            act (KnownFunction): The activation, which ``shares_code``.
            inplace (bool): Whether the normalised value may overwrite the
                input.

        Returns:
            Tensor[N, C, *]: The output.
        """
        self._check_input_dim(input)
        output, codes = norm_for_smooth(
            input,
            self.weight,
            self.bias,
            self.next_settings(),
            act.quantizer.bits,
            self.quantizer,
            self.stats_group(),
            inplace,
        )
        return act.follow_norm(output, codes)

    def next_settings(self):
        """Make the settings of the next call.

        A layer without momentum counts the batch here, so that the settings
        serve one call.

        Returns:
            NormSettings: The settings.
        """
        buffers = self.next_buffers()
        counts = buffers[2] is not None
        return NormSettings(
            *buffers,
            self.uses_batch_stats(),
            # A cumulative average needs the count of batches on the host.
            self.momentum if counts else self._next_momentum(),
            self.eps,
        )

    def next_buffers(self):
        """Buffers that the next call reads or updates.

        Returns:
            tuple[Tensor[C] | None, Tensor[C] | None, Tensor[] | None]: The
            first three fields of :class:`NormSettings`.
        """
        tracks = self.training and self.track_running_stats
        if self.training and not tracks:
            return None, None, None
        mean, var, count = self._read_buffers()
        # Kernels count the batches, but where the host needs the count.
        counts = tracks and self.momentum is not None
        return mean, var, count if counts else None

    def stats_group(self):
        """ProcessGroup, optional: The processes that share statistics."""
        return None

    def _compress(self, input):
        if not input.numel():
            return self.torch_class().forward(self, input)
        self._check_input_dim(input)
        batch_stats = self.uses_batch_stats()
        if not self.takes_size(input.shape):
            return self.torch_class().forward(self, input)
        return batch_norm(
            input,
            self.weight,
            self.bias,
            *self._running_stats(),
            batch_stats,
            self._next_momentum(),
            self.eps,
            self.quantizer,
        )

    def is_frozen(self, input):
        """Whether all is constant, so that :meth:`frozen_act_` can run.

        Args:
            input (Tensor[*]): Input of the layer.
        """
        constants = (
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
        )
        return (
            not self.training
            and self.quantizer.fused_bits is not None
            and torch.is_grad_enabled()
            and not torch.jit.is_tracing()
            and not input.requires_grad
            and input.dtype in VALID_DTYPES
            and 2 <= input.dim() <= 4
            and input.shape[1] == self.num_features <= MAX_FROZEN_CHANNELS
            and (
                input.is_contiguous()
                or input.is_contiguous(memory_format=torch.channels_last)
            )
            and self.running_mean is not None
            and all(
                tensor is None
                or (tensor.dtype is torch.float32 and not tensor.requires_grad)
                for tensor in constants
            )
        )

    def frozen_act_(self, input, relu, residual=None):
        """Normalise with optional addition and ReLU, in place.

        Nothing is kept for a backward pass.

        Args:
            input (Tensor[N, C, *]): Input of the layer; see
                :meth:`is_frozen`.
            relu (bool): Whether to rectify.
            residual (Tensor[N, C, *], optional): Added before the ReLU, with
                the strides of ``input``.
        """
        frozen_norm_act_(
            input,
            residual,
            *self._running_stats(),
            self.weight,
            self.bias,
            self.eps,
            relu,
        )

    def _running_stats(self):
        """Running mean and variance, or None twice if they are not used.

        As torch's layer passes them to its function.
        """
        if self.training and not self.track_running_stats:
            return None, None
        return self._read_buffers()[:2]

    def _read_buffers(self):
        # Attributes are looked for in several places before this one.
        try:
            return _STATISTICS(self._buffers)
        except KeyError:
            names = 'running_mean', 'running_var', 'num_batches_tracked'
            return tuple(getattr(self, name) for name in names)

    def uses_batch_stats(self):
        """bool: Whether the statistics are those of the batch."""
        return self.training or self.running_mean is None

    def _next_momentum(self):
        """Weight of this batch; counts the batch if the layer tracks."""
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


@register_layer(
    _BatchNorm,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    aliases={'mmengine.model.utils._BatchNormXd': ['15e1d4049ff763c1']},
    examples=lambda: {
        'plain': (lambda: QBatchNorm(4), (3, 4, 9, 5)),
    },
)
class QBatchNorm(_QBatchNorm, _BatchNorm):
    """Batch normalisation of any rank that keeps its input as codes.

    The output is exact. The gradients of weight and bias are unbiased. With
    running statistics (``norm_eval=True`` in OpenMMLab's backbones) the
    gradient of the input is exact, and the input is kept, as codes, only for
    a trainable weight. Without grad and at level L0 it is torch's layer.

    Args:
        *args: As ``nn.BatchNorm2d``.
        bits (int, optional): Bits an element of the kept input at every level
            but L0. Valid values are 1 to 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.BatchNorm2d``.
    """

    def _check_input_dim(self, input):
        """Accept every rank that has channels."""
        if input.dim() < 2:
            raise ValueError(
                f'expected an input of 2 dimensions or more, got {input.dim()}'
            )

    def forward(self, input):
        """See ``nn.BatchNorm2d``."""
        return run(
            self,
            _BatchNorm.forward,
            QBatchNorm._compress,
            (input,),
            (self.weight, self.bias),
        )


@register_layer(
    nn.BatchNorm1d,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    names=('QBN1d',),
    examples=lambda: {
        'plain': (lambda: QBatchNorm1d(5), (33, 5)),
        '3-d': (lambda: QBatchNorm1d(5), (3, 5, 17)),
    },
)
class QBatchNorm1d(_QBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that keeps its input as codes of a few bits.

    See :class:`QBatchNorm` for arguments and behaviour.

    Examples:
        >>> norm = QBatchNorm1d(8)
        >>> norm(torch.randn(2, 8, 4)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.BatchNorm1d``."""
        return run(
            self,
            nn.BatchNorm1d.forward,
            QBatchNorm1d._compress,
            (input,),
            (self.weight, self.bias),
        )


@register_layer(
    nn.BatchNorm2d,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    names=(
        'QBN2d',
        'QBN',
    ),
    examples=lambda: {
        'plain': (lambda: QBatchNorm2d(4), (3, 4, 9, 5)),
    },
)
class QBatchNorm2d(_QBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that keeps its input as codes of a few bits.

    See :class:`QBatchNorm` for arguments and behaviour.

    Examples:
        >>> norm = QBatchNorm2d(8)
        >>> norm(torch.randn(2, 8, 4, 4)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.BatchNorm2d``."""
        return run(
            self,
            nn.BatchNorm2d.forward,
            QBatchNorm2d._compress,
            (input,),
            (self.weight, self.bias),
        )


@register_layer(
    nn.BatchNorm3d,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    names=('QBN3d',),
    examples=lambda: {
        'plain': (lambda: QBatchNorm3d(4), (3, 4, 3, 5, 4)),
    },
)
class QBatchNorm3d(_QBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` that keeps its input as codes of a few bits.

    See :class:`QBatchNorm` for arguments and behaviour.

    Examples:
        >>> norm = QBatchNorm3d(8)
        >>> norm(torch.randn(2, 8, 4, 4, 4)).sum().backward()
    """

    def forward(self, input):
        """See ``nn.BatchNorm3d``."""
        return run(
            self,
            nn.BatchNorm3d.forward,
            QBatchNorm3d._compress,
            (input,),
            (self.weight, self.bias),
        )
