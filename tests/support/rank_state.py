"""Hooks that show what each process of a distributed training does."""

import os
import signal
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from mmactnn import get_precision
from mmactnn.hooks import ActNNHook


@HOOKS.register_module()
class RankStateHook(Hook):
    """Save what every process starts and ends with.

    A dict goes to ``rank<N>.pth`` in the work directory: ``model``, the
    state; ``losses`` of all iterations; ``precision``, the state of the
    adaptive bits; and ``started``, what that state, the iteration and the
    state of the rounding were before the first iteration.
    """

    def __init__(self):
        self.losses = []
        self.started = None

    def before_train(self, runner):
        """Note what there is to go on with."""
        hook = next(h for h in runner.hooks if isinstance(h, ActNNHook))
        self.started = dict(
            iteration=runner.iter,
            rounding=hook.generator.state_dict(),
            precision=get_precision(runner.model).state_dict(),
        )

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        """Note the loss, which differs where the data do."""
        self.losses.append(outputs['loss'].item())

    def after_train(self, runner):
        """Save the state."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        state = dict(
            model=model.state_dict(),
            losses=self.losses,
            precision=get_precision(model).state_dict(),
            started=self.started,
        )
        torch.save(state, Path(runner.work_dir, f'rank{get_rank()}.pth'))


@HOOKS.register_module()
class KillRankHook(Hook):
    """Kill one process as the out-of-memory killer does it.

    Args:
        iteration (int, optional): After which iteration. Defaults to never.
        rank (int, optional): Which process. Defaults to 1.
    """

    priority = 'LOWEST'

    def __init__(self, iteration=None, rank=1):
        self.iteration = iteration
        self.rank = rank

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        """Maybe die."""
        if runner.iter == self.iteration and get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
