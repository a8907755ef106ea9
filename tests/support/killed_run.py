"""A training run that kills itself.

It writes the loss of every iteration and the bits of every layer after it, as
lines of json, to ``losses.jsonl`` in its directory; and its output to
``log.txt``.
"""

import json
import os
import signal
from pathlib import Path

from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmactnn import get_precision
from support.processes import write_output
from support.toy import make_runner

EPOCHS = 5
KILL_ITERATION = 7  # of 15, in the middle of the third epoch


def die():
    """As the out-of-memory killer does it: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class KillingHook(Hook):
    """Records, and kills the process somewhere.

    Args:
        where (str): ``'epoch'``, ``'checkpoint'``, ``'evaluation'`` or
            ``'nowhere'``.
        file (str): Where the records go.
    """

    priority = 'LOWEST'

    def __init__(self, where, file):
        self.where = where
        self.file = file

    def before_run(self, runner):
        """Prepare to die while a checkpoint is written."""
        if self.where != 'checkpoint':
            return
        put = LocalBackend.put

        def put_half(backend, data, path):
            if 'epoch_3' not in str(path):
                return put(backend, data, path)
            with open(path, 'wb') as file:
                file.write(data[: len(data) // 2])
                file.flush()
                os.fsync(file.fileno())
                die()

        LocalBackend.put = put_half

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        """Record, and maybe die."""
        record = dict(
            iteration=runner.iter,
            loss=outputs['loss'].item().hex(),
            bits=get_precision(runner.model).bits,
        )
        with open(self.file, 'a') as file:
            file.write(json.dumps(record) + '\n')
        if self.where == 'epoch' and runner.iter == KILL_ITERATION:
            die()

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Maybe die."""
        if self.where == 'evaluation' and runner.iter > KILL_ITERATION:
            die()


def main(folder, where, resume):
    """Train.

    Args:
        folder (str): Work directory.
        where (str): See :class:`KillingHook`.
        resume (bool): Whether to go on from the last checkpoint.
    """
    write_output(Path(folder) / 'log.txt')
    file = str(Path(folder) / 'losses.jsonl')
    runner = make_runner(
        Path(folder),
        dict(type='ActNNHook', level=dict(fuse=False)),
        dict(type='KillingHook', where=where, file=file),
        epochs=EPOCHS,
        evaluates=True,
        resume=resume,
    )
    runner.train()
