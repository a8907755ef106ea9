"""Compressed synchronised batch normalisation."""

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd.sync_batch_norm import sync_batch_norm
from .norm import QBatchNorm


class QSyncBatchNorm(QBatchNorm, nn.SyncBatchNorm, _BatchNorm):
    """``nn.SyncBatchNorm`` that keeps its input as codes of a few bits.

    Works over NCCL and gloo, hence on CPU too, where torch's own layer does
    not. In one process it is :class:`QBatchNorm`; in eval mode and at level
    L0 it is ``nn.SyncBatchNorm``.

    Args:
        *args: As ``nn.SyncBatchNorm``.
        bits (int, optional): See :class:`QBatchNorm`.
        group_size (int, optional): See :class:`QBatchNorm`.
        **kwargs: As ``nn.SyncBatchNorm``.
    """

    def forward(self, input):
        """See ``nn.SyncBatchNorm``."""
        synchronises = (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )
        if not synchronises or not self.compresses(
            input, self.weight, self.bias
        ):
            return super().forward(input)
        self._check_input_dim(input)
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
