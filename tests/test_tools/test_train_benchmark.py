"""Tests of tools/benchmark/train.py and its parts."""

import csv
import dataclasses
import json
import sys
import types

import pytest
import torch
from support.tools import ROOT, load_tool
from support.torchvision_stub import run_with_mmpretrain
from torch import nn

from training import models, plots, report, systems
from training.measure import is_out_of_memory, limit_memory, measure
from training.process import run_trial
from training.search import search_largest
from training.trial import ERROR, OK, OUT_OF_MEMORY, TIMEOUT, Trial

train = load_tool('benchmark/train.py')

RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
NARROW = (
    'model.backbone.base_channels=16',
    'model.backbone.stem_channels=16',
    'model.neck.in_channels=[16,32,64,128]',
    'model.neck.out_channels=32',
    'model.bbox_head.in_channels=32',
    'model.bbox_head.feat_channels=32',
)

# Trains up to a batch size, hangs at one, and has no memory for the others.
HUNGRY = """
import time

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS


@MODELS.register_module()
class Hungry(BaseModel):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, inputs, data_samples, mode):
        if len(inputs) == 9:
            time.sleep(600)
        if len(inputs) > 4:
            raise torch.OutOfMemoryError('there is no more')
        return dict(loss=self.conv(inputs).square().mean())
"""
HUNGRY_CONFIG = """
default_scope = 'mmdet'
custom_imports = dict(imports=['hungry'], allow_failed_imports=False)
model = dict(type='Hungry', num_classes=5)
"""


def make_trial(**changes):
    settings = dict(
        model=RETINANET,
        system='exact',
        batch_size=2,
        image_size=(64, 64),
        cfg_options=NARROW,
        device='cpu',
        warmup=1,
        steps=1,
    )
    return Trial(**{**settings, **changes})


def make_row(system='exact', batch_size=2, result=OK, **figures):
    trial = make_trial(system=system, batch_size=batch_size)
    if result == OK:
        figures = dict(
            images_per_s=10.0 * batch_size,
            activations_mib=4.0,
            peak_mib=5.0,
            **figures,
        )
    return {**dataclasses.asdict(trial), 'result': result, **figures}


@pytest.fixture
def hungry(tmp_path, monkeypatch):
    """A config of a model that trains up to batch size 4."""
    (tmp_path / 'hungry.py').write_text(HUNGRY)
    config = tmp_path / 'config.py'
    config.write_text(HUNGRY_CONFIG)
    monkeypatch.setenv('PYTHONPATH', f'{ROOT}:{tmp_path}')
    return str(config)


class TestSearch:
    @pytest.mark.parametrize('limit', [16, 17, 100, 128, 1000, 1023])
    @pytest.mark.parametrize('step', [1, 16])
    def test_finds_the_largest(self, limit, step):
        tried = []

        def fits(value):
            tried.append(value)
            return value <= limit

        assert search_largest(fits, step=step) == limit // step * step
        assert len(set(tried)) == len(tried) <= 21
        assert all(value % step == 0 for value in tried)

    def test_begins_at_the_minimum(self):
        tried = []
        assert search_largest(tried.append, minimum=50, step=16) is None
        assert tried == [64]

    @pytest.mark.parametrize('name', ['minimum', 'step'])
    def test_rejects(self, name):
        with pytest.raises(ValueError, match=f'{name} must be 1 or more'):
            search_largest(bool, **{name: 0})


class TestSystems:
    @pytest.mark.parametrize(
        'name', ['exact', 'checkpoint', 'save_on_cpu', 'compile']
    )
    def test_by_name(self, name):
        assert systems.parse_system(name) == systems.System(name)
        system = systems.parse_system(f'{name}+fp16')
        assert system == systems.System(name, 'fp16')

    def test_levels(self):
        assert systems.parse_system('L3.1').level.chunk_mib == 64
        system = systems.parse_system('L2:{"conv": 8}+bf16')
        assert (system.level.conv, system.level.norm) == (8, 4)
        assert system.precision == 'bf16'

    def test_compile_budget(self):
        assert systems.parse_system('compile:0.3').budget == 0.3

    @pytest.mark.parametrize(
        'name',
        ['L9', 'exact:1', 'exact+fp8', 'compile:2', 'compile:x', 'L3:{',
         'L3:[1]', 'L3:{"bits":1}', 'L3:{"conv":9}'],
    )  # fmt: skip
    def test_rejects(self, name):
        with pytest.raises(ValueError, match='must|has the fields'):
            systems.parse_system(name)

    def test_expandable_segments(self, monkeypatch):
        monkeypatch.delenv('PYTORCH_ALLOC_CONF', raising=False)
        environment = systems.parse_system('L5').environment
        assert environment == dict(
            PYTORCH_ALLOC_CONF='expandable_segments:True'
        )
        assert systems.parse_system('L4').environment == {}
        monkeypatch.setenv('PYTORCH_ALLOC_CONF', 'max_split_size_mb:64')
        environment = systems.parse_system('L5').environment
        assert environment['PYTORCH_ALLOC_CONF'].startswith('max_split')

    def test_checkpoint_needs_blocks(self):
        with pytest.raises(ValueError, match='got Sequential'):
            systems.checkpoint_blocks(nn.Sequential(nn.ReLU()))


class TestModels:
    def test_resnet_blocks(self):
        assert models.resnet_blocks(50) == [3, 4, 6, 3]
        assert models.resnet_blocks(101) == [3, 4, 23, 3]
        assert models.resnet_blocks(152) == [3, 8, 36, 3]
        with pytest.raises(ValueError, match='35 or more, got 34'):
            models.resnet_blocks(34)

    def test_scale_resnet(self):
        name = models.scale_resnet('resnet:width=128', depth=302)
        assert name == 'resnet:depth=302,width=128'

    @pytest.mark.parametrize('name', ['resnet50', 'resnet:', 'resnet:depth=x'])
    def test_rejects(self, name):
        with pytest.raises(ValueError, match='resnet:depth=D,width=W'):
            models.parse_resnet(name)

    def test_torchvision_and_mmpretrain(self):
        script = """
from training.measure import measure
from training.trial import Trial
for model in ('resnet:depth=38,width=8',
              'mmpretrain::resnet/resnet18_8xb32_in1k.py'):
    exact, ours, blocks = (
        measure(Trial(model, system, 2, (64, 64), device='cpu', warmup=0,
                      steps=1))
        for system in ('exact', 'L3', 'checkpoint'))
    assert exact['finite'] and ours['finite'] and blocks['finite']
    kept = exact['activations_mib']
    assert kept > 4 * ours['activations_mib'] > 0
    assert kept > blocks['activations_mib'] > 0
"""
        run_with_mmpretrain(script, 'tools/benchmark')


class TestMeasure:
    @pytest.fixture(autouse=True)
    def torchvision(self, monkeypatch):
        small = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000),
        )  # fmt: skip
        module = types.SimpleNamespace(
            models=types.SimpleNamespace(small=lambda: small)
        )
        monkeypatch.setitem(sys.modules, 'torchvision', module)

    def measure(self, system, **changes):
        return measure(
            make_trial(
                model='small', system=system, image_size=(96, 48), **changes
            )
        )

    def test_activations(self):
        rows = {name: self.measure(name) for name in ('exact', 'L0', 'L3')}
        kept = {name: row['activations_mib'] for name, row in rows.items()}
        assert kept['exact'] == kept['L0'] > 4 * kept['L3'] > 0
        for row in rows.values():
            assert row['result'] == OK and row['finite']
            assert row['ms_per_step'] > 0 and row['images_per_s'] > 0
            assert row['peak_mib'] is None and row['on_host_mib'] == 0

    def test_save_on_cpu(self):
        exact, row = self.measure('exact'), self.measure('save_on_cpu')
        assert row['activations_mib'] == row['on_host_mib']
        assert row['activations_mib'] == exact['activations_mib']

    def test_use_gradient(self):
        row = self.measure('L3:{"use_gradient": true}', steps=3)
        assert row['finite']

    @pytest.mark.parametrize('precision', ['fp16', 'bf16'])
    def test_amp(self, precision):
        row = self.measure('L3', precision=precision, channels_last=True)
        assert row['finite']

    def test_timeline(self):
        samples = self.measure('L3', timeline=True)['samples']
        phases = [phase for _, phase, _, _ in samples]
        assert phases == sorted(
            phases, key=['forward', 'backward', 'update'].index
        )
        # The start, nine layers and the end of the phase; as many gradients
        # but for the flattened one's, which is the same as its input's.
        assert phases.count('forward') == 11
        assert phases.count('backward') >= 9
        times = [ms for ms, *_ in samples]
        assert times == sorted(times)
        assert all(most >= now > 0 for _, _, now, most in samples)

    def test_unknown_model(self):
        with pytest.raises(ValueError, match="got 'large'"):
            measure(make_trial(model='large'))

    def test_memory_limit_needs_a_gpu(self):
        with pytest.raises(ValueError, match='got device cpu'):
            limit_memory(torch.device('cpu'), 100)

    def test_out_of_memory(self):
        assert is_out_of_memory(torch.OutOfMemoryError('none left'))
        assert is_out_of_memory(
            RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')
        )
        assert not is_out_of_memory(RuntimeError('shapes differ'))


class TestProcess:
    def test_environment_reaches_the_process(self):
        row = run_trial(make_trial(system='L5'))
        assert row['result'] == ERROR
        assert 'no CUDA device is available' in row['message']
        assert 'Traceback' in row['log']

    def test_timeout(self, hungry):
        trial = make_trial(model=hungry, cfg_options=(), batch_size=9)
        assert run_trial(trial, timeout=1) == dict(result=TIMEOUT)


class TestResults:
    def test_finished_rows_are_found_again(self, tmp_path):
        trial = make_trial()
        results = report.Results(tmp_path)
        assert results.find(trial) is None
        results.add(trial, dict(result=TIMEOUT))
        assert results.find(trial) is None
        row = results.add(trial, dict(result=OK, images_per_s=1.5))
        assert len(results.rows) == 1

        again = report.Results(tmp_path)
        assert again.find(trial) == json.loads(json.dumps(row))
        assert again.find(make_trial(batch_size=3)) is None
        assert not list(tmp_path.glob('*.part'))

    def test_errors_are_logged(self, tmp_path):
        row = report.Results(tmp_path).add(
            make_trial(), dict(result=ERROR, message='bad', log='all of it')
        )
        assert 'log' not in row
        assert 'all of it' in (tmp_path / 'errors.log').read_text()

    def test_csv(self, tmp_path):
        report.Results(tmp_path).add(
            make_trial(), dict(result=OK, images_per_s=1.5, samples=[[1, 2]])
        )
        with open(tmp_path / 'results.csv') as file:
            (row,) = csv.DictReader(file)
        assert row['image_size'] == '64 64' and row['images_per_s'] == '1.5'
        assert 'samples' not in row


class TestPlots:
    def test_throughput(self):
        pytest.importorskip('matplotlib')
        rows = [
            make_row('exact', 4),
            make_row('exact', 2),
            make_row('exact', 16, OUT_OF_MEMORY),
            make_row('exact', 8, OUT_OF_MEMORY),
            make_row('L3', 8, OUT_OF_MEMORY),
        ]
        axes = plots.plot_throughput(rows).axes[0]
        line, cross, nothing, other_cross = axes.lines
        assert list(line.get_xdata()) == [2, 4]
        assert list(line.get_ydata()) == [20, 40]
        assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (8, 40)
        assert len(nothing.get_xdata()) == 0
        assert cross.get_color() != other_cross.get_color()

    def test_files(self, tmp_path):
        pytest.importorskip('matplotlib')
        samples = [[0.0, 'forward', 1.0, 1.0], [2.0, 'update', 1.0, 3.0]]
        rows = [make_row(samples=samples), make_row('L3')]
        names = {path.name for path in plots.write_plots(rows, tmp_path)}
        assert names == {
            f'retinanet_r18_fpn_1x_coco_{kind}.png'
            for kind in ('throughput', 'memory', 'timeline')
        }
        assert all((tmp_path / name).stat().st_size for name in names)

    def test_nothing_trained(self, tmp_path):
        pytest.importorskip('matplotlib')
        rows = [make_row(result=OUT_OF_MEMORY)]
        assert plots.write_plots(rows, tmp_path) == []

    def test_without_matplotlib(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
        with pytest.raises(SystemExit):
            train.parse_args(['--plot', '--out', str(tmp_path)])
        assert 'mmactnn[benchmark]' in capsys.readouterr().err


class TestArguments:
    def test_trials(self):
        args = train.parse_args(
            ['--models', 'resnet50', RETINANET, '--systems', 'exact',
             'L3+fp32', '--batch-size', '1', '2', '--image-size', '64', '96',
             '--amp', 'bf16', '--cfg-options', *NARROW]
        )  # fmt: skip
        trials = train.make_trials(args)
        assert len(trials) == 8
        assert trials[1].system == 'L3+fp32' and trials[1].precision == 'fp32'
        assert trials[0].precision == 'bf16'
        assert trials[0].image_size == (64, 96)
        assert trials[0].cfg_options == ()
        assert trials[4].cfg_options == NARROW

    @pytest.mark.parametrize(
        'argv, message',
        [
            (['--systems', 'L9'], 'a system must be'),
            (['--batch-size', '0'], 'batch_size must be 1 or more'),
            (['--image-size', '1', '2', '3'], 'one or two numbers'),
            (['--largest', 'depth'], 'resnet:depth=D'),
            (['--plot'], '--plot needs a folder'),
            (
                ['--plot', '--out=x', '--largest=image-size'],
                'drawn over the batch size',
            ),
        ],
    )
    def test_rejects(self, argv, message, capsys):
        with pytest.raises(SystemExit):
            train.parse_args(argv)
        assert message in capsys.readouterr().err


class TestLargest:
    def find(self, quantity, fits, model='resnet:depth=50'):
        def measure(trial):
            result = fits(trial)
            return dict(dataclasses.asdict(trial), result=result)

        trial = make_trial(model=model)
        return train.find_largest(trial, quantity, 16, measure)

    @pytest.mark.parametrize('quantity', train.QUANTITIES)
    def test_quantities(self, quantity):
        def size(trial):
            resnet = models.parse_resnet(trial.model)
            return {
                'batch': trial.batch_size,
                'image-size': trial.image_size[1],
                'depth': resnet['depth'],
                'width': resnet['width'],
            }[quantity]

        row = self.find(
            quantity, lambda t: OK if size(t) <= 200 else OUT_OF_MEMORY
        )
        assert (row['largest'], row['result']) == (192, OK)
        assert row['quantity'] == quantity
        assert row['model'] == 'resnet:depth=50'

    def test_nothing_fits(self):
        row = self.find('batch', lambda trial: OUT_OF_MEMORY)
        assert (row['largest'], row['result']) == (None, OUT_OF_MEMORY)

    def test_failure_ends_the_search(self):
        row = self.find('batch', lambda trial: TIMEOUT)
        assert (row['largest'], row['result']) == (None, TIMEOUT)


def test_command_line(hungry, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'out'
    argv = ['--models', hungry, '--systems', 'exact', '--device', 'cpu']
    argv += ['--image-size', '8', '--warmup', '0', '--steps', '1']
    argv += ['--out', str(folder), '--batch-size', '4', '5']
    train.main(argv)
    rows = json.loads((folder / 'results.json').read_text())
    assert [row['result'] for row in rows] == [OK, OUT_OF_MEMORY]
    assert rows[0]['finite'] and rows[0]['images_per_s'] > 0
    assert 'out of memory' in capsys.readouterr().out

    measured = []

    def run(trial, timeout):
        measured.append(trial.batch_size)
        if len(measured) == 1:
            return dict(result=ERROR, message='KeyError: 8', log='KeyError: 8')
        return dict(result=OK if trial.batch_size <= 4 else OUT_OF_MEMORY)

    # What trained or ran out of memory is known; what failed is tried again.
    monkeypatch.setattr(train, 'run_trial', run)
    train.main([*argv, '8'])
    assert measured == [8]
    assert 'KeyError' in (folder / 'errors.log').read_text()
    train.main([*argv, '--largest', 'batch', '--resolution', '1'])
    assert measured == [8, 1, 2, 8, 6]
    with open(folder / 'largest.csv') as file:
        (row,) = csv.DictReader(file)
    assert (row['quantity'], row['largest']) == ('batch', '4')


def test_a_detector_in_a_process_of_its_own():
    row = run_trial(make_trial(system='L3'))
    assert row['result'] == OK and row['finite']
    assert row['activations_mib'] > 0
