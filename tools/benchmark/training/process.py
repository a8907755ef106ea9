"""Trials in processes of their own."""

import asyncio
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

from shared.processes import run_logged
from shared.results import OK

from .systems import parse_system

_SCRIPT = Path(__file__).parents[1] / 'train.py'


def run_trial(trial, timeout=None):
    """Measure a trial in a new process, killed after ``timeout`` seconds.

    Returns:
        dict: Figures of :func:`training.measure.measure`, or those of
        :func:`shared.processes.run_logged` with the output as ``log``.
    """
    environment = {**os.environ, **parse_system(trial.system).environment}
    with tempfile.TemporaryDirectory() as folder:
        spec, row, log = (
            Path(folder, name) for name in ('trial.json', 'row.json', 'log')
        )
        spec.write_text(json.dumps(dataclasses.asdict(trial)))
        command = [sys.executable, _SCRIPT, '--measure', spec, row]
        outcome = asyncio.run(run_logged(command, environment, log, timeout))
        if outcome['result'] == OK:
            return json.loads(row.read_text())
        return outcome | dict(log=log.read_text(errors='replace'))
