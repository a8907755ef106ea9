"""Runs trials, each in a process of its own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from .measure import measure
from .systems import parse_system
from .trial import ERROR, TIMEOUT, Trial

_SCRIPT = Path(__file__).parents[1] / 'train.py'


def run_trial(trial, timeout=None):
    """Measure a trial in a new process.

    Args:
        trial (Trial): What is measured.
        timeout (float, optional): Seconds after which the process is killed.
            Defaults to never.

    Returns:
        dict: What :func:`training.measure.measure` returns; or a ``result``
        of ``'timeout'`` or ``'error'``, the latter with the last line that
        the process wrote as ``message`` and all of them as ``log``.
    """
    environment = {**os.environ, **parse_system(trial.system).environment}
    with tempfile.TemporaryDirectory() as folder:
        spec, result, log = (
            Path(folder, name) for name in ('trial.json', 'row.json', 'log')
        )
        spec.write_text(json.dumps(dataclasses.asdict(trial)))
        command = [sys.executable, str(_SCRIPT), '--measure', spec, result]
        with open(log, 'w') as output:
            code = _run(command, environment, output, timeout)
        if code is None:
            return dict(result=TIMEOUT)
        if code == 0:
            return json.loads(result.read_text())
        text = log.read_text(errors='replace')
    return dict(result=ERROR, message=describe_failure(code, text), log=text)


def describe_failure(code, text):
    """Why a process has failed, in a line.

    Args:
        code (int): Its exit status; minus a signal if that has ended it.
        text (str): What it has written.

    Returns:
        str: The signal, the last line written or else the exit status.
    """
    if code < 0:
        return f'killed by {signal.Signals(-code).name}'
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f'exit status {code}'


def measure_file(trial_path, row_path):
    """Measure the trial in a file, in this process.

    Args:
        trial_path (str): A json file with the attributes of a trial.
        row_path (str): The json file to write what was measured to.
    """
    trial = Trial.from_dict(json.loads(Path(trial_path).read_text()))
    Path(row_path).write_text(json.dumps(measure(trial)))


def _run(command, environment, output, timeout):
    """Run a command; return its exit status, or None if it took too long."""
    # In a session of its own, with what it may start itself: compilers, say.
    # Output goes to a file, as a pipe would be held open by those.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Too late, or an interrupt.
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
