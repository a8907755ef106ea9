"""Compressed synchronised batch normalisation."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd.sync_batch_norm import sync_batch_norm
from ..registry import register_layer
from .gateway import run
from .norm import _QBatchNorm


@register_layer(
    nn.SyncBatchNorm,
    saved_by_torch=lambda call: (call.input, *call.statistics),
    names=('QSyncBN',),
    aliases={
        'mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm': [
            '8191a804847049b8'
        ],
        'mmcv.ops.sync_bn.SyncBatchNorm': ['0ab26907bedf450b'],
    },
    examples=lambda: {
        'plain': (lambda: QSyncBatchNorm(4), (3, 4, 9, 5)),
    },
)
class QSyncBatchNorm(_QBatchNorm, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that keeps its input as codes of a few bits.

    Works over NCCL and gloo, hence on CPU too, where torch's own layer does
    not: level L0 keeps the input itself there. In one process it is
    :class:`QBatchNorm`; in eval mode, and on CUDA without grad or at level
    L0, it is ``nn.SyncBatchNorm``.

    Args:
        *args: As ``nn.SyncBatchNorm``.
        bits (int, optional): See :class:`QBatchNorm`.
        group_size (int, optional): See :class:`QBatchNorm`.
        **kwargs: As ``nn.SyncBatchNorm``.
    """

    @staticmethod
    def why_exact(module):
        """See the base class; MMCV's layer has a mode that torch's lacks."""
        mode = getattr(module, 'stats_mode', 'default')
        if mode == 'default':
            return None
        return f'stats_mode is {mode!r}, not the default'

    @classmethod
    def convert_(cls, module, quantizer):
        """See the base class; also converts MMCV's layer."""
        if not isinstance(module, nn.SyncBatchNorm):
            module.process_group = module.group
        super().convert_(module, quantizer)

    def revert_(self):
        """See the base class; also restores MMCV's layer."""
        original = super().revert_()
        if not issubclass(original, nn.SyncBatchNorm):
            del self.process_group
        return original

    def forward(self, input):
        """See ``nn.SyncBatchNorm``."""
        return run(
            self,
            _forward_exactly,
            QSyncBatchNorm._compress,
            (input,),
            (self.weight, self.bias),
        )

    def _compress(self, input):
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        if self._synchronises():
            return self._normalise_batch_of_all(input)
        return super()._compress(input)

    def _normalise_batch_of_all(self, input):
        momentum = self._next_momentum()
        tracks = self.track_running_stats
        return sync_batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            momentum,
            self.eps,
            self.process_group,
            self.quantizer,
        )

    def stats_group(self):
        """See the base class."""
        if not self._synchronises():
            return None
        return self.process_group or dist.group.WORLD

    def _synchronises(self):
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )


def _forward_exactly(layer, input):
    """Run torch's layer, or on a CPU, which that refuses, its equal."""
    if (
        not isinstance(layer, QSyncBatchNorm)
        or not isinstance(input, torch.Tensor)
        or input.is_cuda
    ):
        return nn.SyncBatchNorm.forward(layer, input)
    layer._check_input_dim(input)
    layer._check_non_zero_input_channels(input)
    if layer._synchronises():
        return layer._normalise_batch_of_all(input)
    # Torch's layer refuses the CPU before it counts processes.
    return _BatchNorm.forward(layer, input)
