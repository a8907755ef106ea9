"""A run that is killed goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def run(folder, where, *flags):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, '-m', 'support.killed_run', str(folder), where]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get('PYTHONPATH', '')]
    return subprocess.run(
        [*command, *flags],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


def records(folder):
    """The last record of each iteration."""
    lines = (folder / 'losses.jsonl').read_text().splitlines()
    return {r['iteration']: r for r in map(json.loads, lines)}


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    done = run(folder, 'nowhere')
    assert done.returncode == 0, done.stderr
    found = records(folder)
    assert list(found) == list(range(15))
    # Bits that never change would prove nothing.
    assert found[0]['bits'] != found[14]['bits']
    return found


@pytest.mark.parametrize('where', ['epoch', 'checkpoint', 'evaluation'])
def test_goes_on(where, tmp_path, unbroken):
    done = run(tmp_path, where)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(records(tmp_path)) < 15
    if where == 'checkpoint':  # what is there now cannot be loaded
        broken = (tmp_path / 'epoch_3.pth').stat().st_size
        assert broken < (tmp_path / 'epoch_2.pth').stat().st_size
    done = run(tmp_path, 'nowhere', '--resume')
    assert done.returncode == 0, done.stderr
    assert records(tmp_path) == unbroken
