"""Processes that end together with their children."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

from .results import ERROR, OK, TIMEOUT


async def run_logged(command, environment, log_path, timeout=None):
    """Run a command and add its output to a file.

    After ``timeout`` seconds or an interrupt it is ended, with its children.

    Returns:
        dict: ``result``, and the ``message`` of an error: the signal that
        ended the process, its last line or else its exit status.
    """
    # Output goes to a file: children would hold a pipe open.
    with open(log_path, 'a') as log:
        start = log.tell()
        code = await _execute(command, environment, log, timeout)
    if code in (None, 0):
        return dict(result=TIMEOUT if code is None else OK, message=None)
    if code < 0:
        message = f'killed by {signal.Signals(-code).name}'
    else:
        with open(log_path, errors='replace') as log:
            log.seek(start)
            lines = [line.strip() for line in log if line.strip()]
        message = lines[-1] if lines else f'exit status {code}'
    return dict(result=ERROR, message=message)


async def _execute(command, environment, log, timeout):
    """Exit status of a command, or None after a timeout."""
    # In a session of its own, so that its children can be ended, too.
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
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
        # Timeout or interrupt.
        if process.returncode is None:
            # It may already have ended, unknown to asyncio.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def exit_on_sigterm():
    """Make SIGTERM raise an exception, so that child processes are ended."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
