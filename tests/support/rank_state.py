"""A hook that shows what each process of a distributed training ended with."""

from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RankStateHook(Hook):
    """Save the model's state and the first losses of every process.

    They go to ``rank<N>.pth`` in the work directory.
    """

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        """Note the loss, which differs where the data do."""
        self.losses.append(outputs['loss'].item())

    def after_train(self, runner):
        """Save the state."""
        state = dict(
            model=runner.model.module.state_dict(), losses=self.losses
        )
        torch.save(state, Path(runner.work_dir, f'rank{get_rank()}.pth'))
