"""A run that is killed goes on as if it had not been."""

import json
import signal

import pytest
from support import killed_run
from support.processes import run_alone


def run(folder, where, resume=False):
    """Train, and return the exit status."""
    folder.mkdir(exist_ok=True)
    return run_alone(killed_run.main, str(folder), where, resume)


def log_of(folder):
    return (folder / 'log.txt').read_text()


def records(folder):
    """The last record of each iteration."""
    lines = (folder / 'losses.jsonl').read_text().splitlines()
    return {r['iteration']: r for r in map(json.loads, lines)}


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    assert run(folder, 'nowhere') == 0, log_of(folder)
    found = records(folder)
    assert list(found) == list(range(15))
    # Bits that never change would prove nothing.
    assert found[0]['bits'] != found[14]['bits']
    return found


@pytest.mark.parametrize(
    'where',
    [
        'epoch',
        pytest.param('checkpoint', marks=pytest.mark.full),
        'evaluation',
    ],
)
def test_goes_on(where, tmp_path, unbroken):
    assert run(tmp_path, where) == -signal.SIGKILL, log_of(tmp_path)
    assert len(records(tmp_path)) < 15
    if where == 'checkpoint':  # what is there now cannot be loaded
        broken = (tmp_path / 'epoch_3.pth').stat().st_size
        assert broken < (tmp_path / 'epoch_2.pth').stat().st_size
    assert run(tmp_path, 'nowhere', resume=True) == 0, log_of(tmp_path)
    assert records(tmp_path) == unbroken
