"""A run that is killed goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def run():
    """Starts a run and returns its exit status."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get('PYTHONPATH', '')]
    with subprocess.Popen(
        [sys.executable, '-m', 'support.killed_run'],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def start(folder, where, resume=False):
            folder.mkdir(exist_ok=True)
            job = json.dumps([str(folder), where, resume])
            print(job, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield start
        process.stdin.close()


def log_of(folder):
    return (folder / 'log.txt').read_text()


def records(folder):
    """The last record of each iteration."""
    lines = (folder / 'losses.jsonl').read_text().splitlines()
    return {r['iteration']: r for r in map(json.loads, lines)}


@pytest.fixture(scope='module')
def unbroken(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    assert run(folder, 'nowhere') == 0, log_of(folder)
    found = records(folder)
    assert list(found) == list(range(15))
    # Bits that never change would prove nothing.
    assert found[0]['bits'] != found[14]['bits']
    return found


@pytest.mark.parametrize('where', ['epoch', 'checkpoint', 'evaluation'])
def test_goes_on(where, run, tmp_path, unbroken):
    assert run(tmp_path, where) == -signal.SIGKILL, log_of(tmp_path)
    assert len(records(tmp_path)) < 15
    if where == 'checkpoint':  # what is there now cannot be loaded
        broken = (tmp_path / 'epoch_3.pth').stat().st_size
        assert broken < (tmp_path / 'epoch_2.pth').stat().st_size
    assert run(tmp_path, 'nowhere', resume=True) == 0, log_of(tmp_path)
    assert records(tmp_path) == unbroken
