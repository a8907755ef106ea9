"""ActNNHook beside the runner's setting `compile`."""

from pathlib import Path

import pytest
import torch
from support.toy import make_runner

from mmactnn import QuantizedLayer, manual_seed

COMPILE = dict(backend='aot_eager')


def train(work_dir, *hooks, compile=None):
    """Train the toy, compiled, and return runner and losses."""
    torch._dynamo.reset()
    runner = make_runner(work_dir, *hooks, dict(type='RecordingHook'))
    runner.cfg.compile = compile
    try:
        runner.train()
    finally:
        # The hook seeds what all graphs share.
        manual_seed(None)
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'RecordingHook')
    return runner, hook.losses


def log(runner):
    paths = Path(runner.work_dir).glob('*/*.log')
    return ''.join(path.read_text() for path in paths)


def test_compiled_steps_keep_codes(tmp_path):
    """Nothing is converted; the first loss is exact, and the log tells."""
    hook = dict(type='ActNNHook', level='L3')
    _, exact = train(tmp_path / 'exact')
    runner, found = train(tmp_path / 'coded', hook, compile=COMPILE)
    assert not any(
        isinstance(m, QuantizedLayer) for m in runner.model.modules()
    )
    assert found[0] == pytest.approx(exact[0], abs=1e-6)
    assert found != exact
    text = log(runner)
    assert 'ActNN converts no layer: compile=' in text
    assert 'codes of 2 bits' in text


@pytest.mark.full
def test_compiled_runs_repeat(tmp_path):
    """Rounding is a function of seed and iteration."""
    hook = dict(type='ActNNHook', level='L3')
    _, found = train(tmp_path / 'one', hook, compile=COMPILE)
    _, again = train(tmp_path / 'again', hook, compile=COMPILE)
    assert again == found


def test_layers_cannot_be_told_apart(tmp_path):
    hook = dict(type='ActNNHook', exclude=['head'])
    with pytest.raises(ValueError, match='exclude and filter_fn'):
        train(tmp_path, hook, compile=True)


def test_graphs_of_layers(tmp_path):
    hook = dict(type='ActNNHook', cuda_graphs=['body'])
    with pytest.raises(ValueError, match='triton.cudagraphs'):
        train(tmp_path, hook, compile=True)
