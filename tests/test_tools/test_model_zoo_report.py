"""Tests of tools/analysis_tools/model_zoo_report.py."""

import json

import pandas as pd
import pytest
from support.tools import load_tool

zoo = load_tool('analysis_tools/model_zoo_report.py')

# A package with configs of detectors that take a moment.
CONFIG = """
default_scope = 'mmdet'
custom_imports = dict(imports=['mmactnn', 'tinyzoo.models'])
model = dict(type='{type}', channels={channels})
train_dataloader = dict(dataset=dict(pipeline=[]))
train_cfg = {train_cfg}
"""
MODELS = """
import torch
from mmdet.models.detectors import BaseDetector
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn


@MODELS.register_module(force=True)
class Small(BaseDetector):
    def __init__(self, channels, data_preprocessor=None, init_cfg=None):
        super().__init__(dict(type='DetDataPreprocessor'))
        self.conv = nn.Conv2d(3, channels, 3)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def loss(self, inputs, data_samples):
        return dict(loss=self.relu(self.norm(self.conv(inputs))).mean())

    def predict(self, inputs, data_samples):
        raise NotImplementedError

    extract_feat = _forward = predict


@MODELS.register_module(force=True)
class Broken(Small):
    def loss(self, inputs, data_samples):
        raise ValueError('no such thing\\nas this')


@MODELS.register_module(force=True)
class Wide(Small):
    def loss(self, inputs, data_samples):
        raise RuntimeError('op_impl: implementation for device cpu not found')


@MODELS.register_module(force=True)
class Tracker(BaseModel):
    def __init__(self, channels):
        super().__init__()

    def forward(self, inputs, data_samples, mode):
        raise NotImplementedError
"""
CONFIGS = {
    'small/narrow.py': dict(type='Small', channels=4),
    'small/wide.py': dict(type='Small', channels=8),
    'small/test_only.py': dict(type='Small', channels=2, train_cfg=None),
    'broken/x.py': dict(type='Broken', channels=4),
    'gpu/x.py': dict(type='Wide', channels=4),
    'missing/x.py': dict(type='NotThere', channels=4),
    'track/x.py': dict(type='Tracker', channels=4),
    'test/x.py': dict(type='Small', channels=4, train_cfg=None),
}


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    """The package, for this process and those that it starts."""
    root = tmp_path_factory.mktemp('zoo')
    folder = root / 'tinyzoo'
    for name, settings in CONFIGS.items():
        path = folder / '.mim' / 'configs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = dict(train_cfg=dict(max_epochs=1)) | settings
        path.write_text(CONFIG.format(**settings))
    (folder / '__init__.py').write_text('')
    (folder / 'models.py').write_text(MODELS)
    (folder / 'utils.py').write_text('def register_all_modules(): pass\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.setattr(zoo, '_PRELOADED', ('mmdet.models',))
        yield 'tinyzoo'


@pytest.fixture(scope='module')
def done(package, tmp_path_factory):
    """A run over all folders: its exit status, results and table."""
    folder = tmp_path_factory.mktemp('out')
    arguments = [package, '--out', str(folder / 'zoo.jsonl')]
    arguments += ['--table', str(folder / 'zoo.md'), '--shape', '32', '48']
    return arguments, zoo.main(arguments), folder


def read(folder):
    lines = (folder / 'zoo.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    choices = [r['choice'] for r in records if 'choice' in r]
    results = {r['config']: r for r in records if 'choice' not in r}
    return {choice['folder']: choice for choice in choices}, results


def test_smallest_model_of_each_folder(done):
    choices, _ = read(done[2])
    assert choices['small']['config'] == 'tinyzoo::small/narrow.py'
    assert choices['small']['parameters'] == 4 * 27 + 4 + 2 * 4
    omitted = {f: c['omitted'] for f, c in choices.items() if c['omitted']}
    assert omitted.keys() == {'missing', 'test', 'track'}
    assert 'no config that trains' in omitted['test']
    assert 'no detector or segmentor' in omitted['track']
    assert 'NotThere is not in the' in omitted['missing']


def test_results(done):
    _, status, folder = done
    # One of two that can run here.
    assert status == 1
    _, results = read(folder)
    small = results['tinyzoo::small/narrow.py']
    assert small['state'] == 'runs' and small['shape'] == [32, 48]
    assert len(small['losses']) == 2
    assert small['exact_bytes'] > 4 * small['kept_bytes']
    assert small['keeps_most'][0][2] <= small['kept_bytes']
    broken = results['tinyzoo::broken/x.py']
    assert broken['state'] == 'fails'
    assert broken['reason'].startswith(
        'cannot be trained: ValueError: no such thing (models.py:'
    )
    gpu = results['tinyzoo::gpu/x.py']
    assert gpu['state'] == 'needs a GPU' and 'op_impl' in gpu['reason']


def test_table(done):
    text = (done[2] / 'zoo.md').read_text()
    titles, _, *rows = text.splitlines()
    assert titles.startswith('| package | folder | config | parameters |')
    assert len(rows) == 3
    assert any(row.startswith('| tinyzoo | small | narrow |') for row in rows)


def test_resumed(done, monkeypatch, capsys):
    """Neither choices nor results are made again; failures on request."""
    arguments, _, folder = done
    path = folder / 'zoo.jsonl'
    # As a run that was killed leaves it.
    text = path.read_text()
    path.write_text(text + '{"config": "tinyzoo::sm')
    monkeypatch.setattr(zoo.stock_configs, 'choose', None)
    measured = []

    def measure(choice, args):
        measured.append(choice.folder)
        return dict(config=choice.config, state='fails', reason='', shape=[1])

    monkeypatch.setattr(zoo, 'measure', measure)
    assert zoo.main(arguments) == 1
    assert measured == []
    assert zoo.main([*arguments, '--folders', 'b*', '--retry']) == 1
    assert measured == ['broken']
    assert zoo.main([*arguments, '--folders', 'small']) == 0
    assert '1 of 1 run (100%)' in capsys.readouterr().out


def test_share_of_what_can_run():
    table = pd.DataFrame(dict(state=['runs', 'needs a GPU', 'fails', 'runs']))
    assert zoo.share_that_runs(table) == pytest.approx(2 / 3)
    assert zoo.share_that_runs(table[:0]) == 1


def test_timeout(package, tmp_path):
    arguments = [package, '--out', str(tmp_path / 'zoo.jsonl')]
    arguments += ['--folders', 'small', '--timeout', '0.01']
    assert zoo.main(arguments) == 1
    _, results = read(tmp_path)
    (result,) = results.values()
    assert result['reason'] == 'not done in 0.01 s'


@pytest.mark.parametrize('option', ['--batch-size', '--steps'])
def test_usage(option, capsys):
    with pytest.raises(SystemExit):
        zoo.main(['--out', 'x.jsonl', option, '0'])
    assert 'must be 1 or more, got 0' in capsys.readouterr().err
