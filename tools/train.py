"""Trains a model: ``python tools/train.py CONFIG``."""

import argparse

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmactnn.mmlab.launch import (
    UsageError,
    add_common_arguments,
    build_runner,
    check_data,
    leave_process_group,
    load_config,
    told_in_one_line,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Train a detector, a segmentor, a classifier or an encoder'
    )
    add_common_arguments(parser)
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train with automatic mixed precision',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the total batch size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from a checkpoint, or from the latest one in the work '
        'directory if none is named',
    )
    return parser.parse_args(argv)


def build_config(args: argparse.Namespace) -> Config:
    """Read the config and merge the command line into it."""
    cfg = load_config(args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UsageError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=N) '
                f'in {args.config}, but there is none'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        # Without a checkpoint the runner looks for the latest one itself.
        cfg.load_from = None if args.resume == 'auto' else args.resume
    return cfg


def enable_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision.

    A config that asks for it itself keeps its settings.
    """
    wrapper = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if wrapper == 'AmpOptimWrapper':
        return
    if wrapper != 'OptimWrapper':
        raise UsageError(
            "--amp needs optim_wrapper.type 'OptimWrapper' or "
            f"'AmpOptimWrapper', got {wrapper!r}"
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


class LastEvaluation(Hook):
    """Evaluates a training that is resumed from its end.

    It may have been killed between its last checkpoint and the evaluation,
    which MMEngine would omit.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Evaluate if no iteration is left."""
        if runner.iter >= runner.max_iters and runner.val_loop is not None:
            runner.val_loop.run()


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    with told_in_one_line():
        cfg = build_config(parse_args(argv))
        check_data(cfg, ['train', 'val'])
    runner = build_runner(cfg)
    runner.register_hook(LastEvaluation())
    runner.train()
    # It refers to the process group.
    del runner
    leave_process_group()


if __name__ == '__main__':
    main()
