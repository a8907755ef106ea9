"""Output of visualizer backends, read back from their files."""

import importlib.util
import json
from collections import OrderedDict

import pytest
import torch
from mmengine.registry import DefaultScope
from support.toy import ITERATIONS, make_runner

from mmactnn.hooks import ActNNHook

# Importing the backends takes longer than all else here.
pytestmark = pytest.mark.full

# All iterations of so short a run on a GPU are its warm-up.
PEAK = 'warmup_peak_mib' if torch.cuda.is_available() else 'peak_mib'
NAMES = ('saved_mib', 'exact_mib', 'ratio', 'layers_ratio', PEAK)

# To import them takes long, in each process that collects tests.
for name in ('tensorboard', 'wandb'):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f'{name} is not installed', allow_module_level=True)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A short training: its directory, and what each scalar has been."""
    with pytest.MonkeyPatch.context() as patch:
        # Each runner leaves a default scope, here for all tests that follow.
        patch.setattr(DefaultScope, '_instance_dict', OrderedDict())
        return train(tmp_path_factory)


def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    offline = dict(
        mode='offline',
        settings=dict(console='off', silent=True, x_disable_stats=True),
    )
    runner = make_runner(
        folder,
        dict(type=ActNNHook.__name__, level='L3', interval=1),
        visualizer=dict(
            type='Visualizer',
            vis_backends=[
                dict(type='TensorboardVisBackend'),
                dict(type='WandbVisBackend', init_kwargs=offline),
            ],
        ),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
    )
    runner.train()
    import wandb

    wandb.teardown()  # its process may still be writing
    scalars = {
        f'actnn/{name}': runner.message_hub.get_scalar(f'train/actnn/{name}')
        for name in NAMES
    }
    expected = {name: list(value.data[0]) for name, value in scalars.items()}
    assert {len(values) for values in expected.values()} == {ITERATIONS}
    assert expected['actnn/ratio'][0] > 2
    return folder, expected


def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    folder, expected = run
    (file,) = folder.rglob('events.out.tfevents.*')
    events = EventAccumulator(str(file)).Reload()
    for name, values in expected.items():
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == list(range(1, ITERATIONS + 1))
        # They are float32 there.
        assert [s.value for s in scalars] == pytest.approx(values, rel=1e-6)


def test_wandb(run):
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    folder, expected = run
    (file,) = folder.rglob('*.wandb')
    store = DataStore()
    store.open_for_scan(str(file))
    rows = []
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof('record_type') == 'history':
            items = record.history.item
            rows.append(
                {
                    item.key or '/'.join(item.nested_key): json.loads(
                        item.value_json
                    )
                    for item in items
                }
            )
    for name, values in expected.items():
        assert [row[name] for row in rows] == pytest.approx(values)
