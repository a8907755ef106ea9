"""Trains runs, several side by side."""

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path

from training.process import describe_failure

from .run import ERROR, OK, TIMEOUT


def make_slots(gpus, per_gpu):
    """Environments of trainings that may run at the same time.

    Args:
        gpus (int): How many GPUs, the first of those visible; 0 is the CPU.
        per_gpu (int): How many trainings side by side on each, or on the CPU.

    Returns:
        list[dict[str, str]]: Variables of each, neighbours on different GPUs.
        Threads are shared out, unless the environment says how many.

    Raises:
        ValueError: If fewer GPUs are visible by name.
    """
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = visible.split(',') if visible else [str(n) for n in range(gpus)]
    if gpus > len(names):
        raise ValueError(
            f'CUDA_VISIBLE_DEVICES must name {gpus} GPUs, got {visible!r}'
        )
    places = (names[:gpus] or ['-1']) * per_gpu
    threads = max(1, (os.cpu_count() or 1) // len(places))
    environment = {'OMP_NUM_THREADS': str(threads), **os.environ}
    return [{**environment, 'CUDA_VISIBLE_DEVICES': name} for name in places]


async def train_all(runs, slots, train):
    """Train runs, as many at a time as there are slots.

    If it is interrupted, so are all of them.

    Args:
        runs (Iterable[Run]): Runs, in the order to begin them in.
        slots (list[dict]): From :func:`make_slots`.
        train (Callable): Called with a run and a slot; returns an awaitable.
    """
    free = asyncio.Queue()
    for slot in slots:
        free.put_nowait(slot)

    async def train_next(run):
        slot = await free.get()
        try:
            await train(run, slot)
        finally:
            free.put_nowait(slot)

    await asyncio.gather(*map(train_next, runs))


async def train_run(run, folder, environment, timeout=None):
    """Train a run and, if it has one, its probe.

    What they print is added to ``log.txt`` in their work directories.

    Args:
        run (Run): The run.
        folder (Path): Where work directories are.
        environment (dict[str, str]): Variables of the processes.
        timeout (float, optional): Seconds after which a process is killed.
            Defaults to never.

    Returns:
        dict: ``result``, and ``message`` after an error: the last line that
        the process has written.
    """
    work_dir, probe_dir = work_dirs(run, folder)
    figures = await _train(
        run.command(work_dir), work_dir, environment, timeout
    )
    if probe_dir is None or figures['result'] != OK:
        return figures
    # MMEngine's, which tells the path that the checkpoint was written to: the
    # folder may have been moved since.
    last = Path((work_dir / 'last_checkpoint').read_text())
    command = run.probe_command(probe_dir, work_dir / last.name)
    return await _train(command, probe_dir, environment, timeout)


def work_dirs(run, folder):
    """Where a run and its probe are trained.

    Args:
        run (Run): The run.
        folder (Path): Where work directories are.

    Returns:
        tuple[Path, Path | None]: Work directories; None without a probe.
    """
    probe_dir = folder / f'{run.name}_probe' if run.probe else None
    return folder / run.name, probe_dir


async def _train(command, work_dir, environment, timeout):
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / 'log.txt'
    with open(path, 'a') as log:
        code = await _execute(command, environment, log, timeout)
    if code is None:
        return dict(result=TIMEOUT, message=None)
    if code != 0:
        message = describe_failure(code, path.read_text(errors='replace'))
        return dict(result=ERROR, message=message)
    return dict(result=OK, message=None)


async def _execute(command, environment, log, timeout):
    """Run a command; return its exit status, or None if it took too long."""
    # In a session of its own, with the workers that it starts.
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return await asyncio.wait_for(process.wait(), timeout)
    except asyncio.TimeoutError:
        return None
    finally:
        # Too late, or an interrupt.
        if process.returncode is None:
            # It may have ended without asyncio having noticed yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
