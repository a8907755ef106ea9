"""Training runs that kill themselves: python -m support.killed_run.

Every line of the input is a list in json: the directory of a run, where it
ends, and whether it resumes. Each runs in a fork of this process, which has
imported what it needs; the line of output is its exit status. A run writes
the loss of every iteration and the bits of every layer after it, as lines of
json, to ``losses.jsonl`` in its directory.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

# Runners import it late: here before there are forks.
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmactnn import get_precision
from support.quick_mmengine import quick_mmengine
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


def run_in_fork(folder, where, resume):
    """Train in a process of its own, whose output goes to ``log.txt``.

    Args:
        folder (str): Work directory.
        where (str): See :class:`KillingHook`.
        resume (bool): Whether to go on from the last checkpoint.

    Returns:
        int: Exit status; negative that of a signal.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with open(Path(folder) / 'log.txt', 'w') as log:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(log.fileno(), stream.fileno())
        main(folder, where, resume)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == '__main__':
    quick_mmengine(pytest.MonkeyPatch())
    for line in sys.stdin:
        print(run_in_fork(*json.loads(line)), flush=True)
