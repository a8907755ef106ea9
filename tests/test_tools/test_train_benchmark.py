"""Tests of tools/benchmark/train.py and its parts."""

import csv
import dataclasses
import json
import sys
import types
from unittest.mock import Mock

import pytest
import torch
from support.forks import make_run_logged
from support.tools import ROOT, load_tool
from support.torchvision_stub import need_mmpretrain
from torch import nn

pytest.importorskip('pandas')

from shared.results import (  # noqa: E402
    ERROR,
    OK,
    OUT_OF_MEMORY,
    TIMEOUT,
    Results,
)
from training import models, plots, systems, trace  # noqa: E402
from training.largest import QUANTITIES, find_largest  # noqa: E402
from training.measure import (  # noqa: E402
    Training,
    is_out_of_memory,
    limit_memory,
    measure,
)
from training.process import run_trial  # noqa: E402
from training.trial import Trial  # noqa: E402

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
default_scope = 'mmseg'
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


class TestSystems:
    def test_by_name(self):
        parse = systems.parse_system
        assert parse('exact+fp16') == systems.System('exact', 'fp16')
        assert parse('compile:0.3').budget == 0.3
        assert parse('L3.1').level.chunk_mib == 64
        level = parse('L2:{"conv": 8}+bf16').level
        assert (level.conv, level.norm) == (8, 4)
        assert parse('L4:{"window_mib": 64}').window_mib == 64
        graphed = parse('L3:{"cuda_graphs": ["backbone", "neck"]}')
        assert graphed.cuda_graphs == ('backbone', 'neck')
        assert graphed.level == parse('L3:{}').level

    @pytest.mark.parametrize(
        'name',
        ['L9', 'exact:1', 'exact+fp8', 'compile:2', 'compile:x', 'L3:{',
         'L3:[1]', 'L3:{"conv":9}', 'L3:{"window_mib":1}'],
    )  # fmt: skip
    def test_rejects(self, name):
        with pytest.raises(ValueError, match='a system must be one of exact'):
            systems.parse_system(name)

    def test_expandable_segments(self, monkeypatch):
        monkeypatch.setenv('PYTORCH_ALLOC_CONF', 'max_split_size_mb:64')
        assert systems.parse_system('L4').environment == {}
        assert systems.parse_system('L5').environment == dict(
            PYTORCH_ALLOC_CONF='max_split_size_mb:64,expandable_segments:True'
        )

    def test_checkpoint_needs_blocks(self):
        with pytest.raises(ValueError, match='got Sequential'):
            systems.checkpoint_blocks(nn.Sequential(nn.ReLU()))


class TestModels:
    @pytest.mark.parametrize(
        'depth, blocks',
        [(50, [3, 4, 6, 3]), (101, [3, 4, 23, 3]), (152, [3, 8, 36, 3])],
    )
    def test_resnet_blocks(self, depth, blocks):
        assert models.resnet_blocks(depth) == blocks

    def test_resnets(self):
        name = models.scale_resnet('resnet:width=128', depth=302)
        assert name == 'resnet:depth=302,width=128'
        with pytest.raises(ValueError, match='35 or more, got 34'):
            models.resnet_blocks(34)
        for name in ('resnet50', 'resnet:', 'resnet:depth=x'):
            with pytest.raises(ValueError, match='resnet:depth=D,width=W'):
                models.parse_resnet(name)

    @pytest.mark.parametrize(
        'model, system',
        [
            ('resnet:depth=38,width=8', 'checkpoint'),
            ('mmpretrain::resnet/resnet18_8xb32_in1k.py', 'L3'),
        ],
    )
    def test_torchvision_and_mmpretrain(self, model, system):
        need_mmpretrain()
        exact, ours = (
            measure(make_trial(model=model, system=s, cfg_options=()))
            for s in ('exact', system)
        )
        assert exact['finite'] and ours['finite']
        assert exact['activations_mib'] > ours['activations_mib'] > 0


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
        changes = dict(model='small', image_size=(96, 48)) | changes
        return measure(make_trial(system=system, **changes))

    def test_activations(self):
        names = ('exact', 'save_on_cpu', 'L0', 'L3')
        rows = {name: self.measure(name) for name in names}
        kept = {name: row['activations_mib'] for name, row in rows.items()}
        assert kept['exact'] == kept['L0'] > 4 * kept['L3'] > 0
        assert kept['save_on_cpu'] == rows['save_on_cpu']['on_host_mib']
        assert kept['save_on_cpu'] == kept['exact']
        for row in rows.values():
            assert row['result'] == OK and row['finite']
            assert row['ms_per_step'] > 0 and row['images_per_s'] > 0
            assert row['peak_mib'] is None
        assert rows['exact']['on_host_mib'] == 0

    @pytest.mark.parametrize(
        'system, settings',
        [
            ('L3:{"use_gradient": true}', dict(steps=3)),
            ('L3', dict(precision='fp16', channels_last=True)),
        ],
    )
    def test_settings(self, system, settings):
        assert self.measure(system, **settings)['finite']

    def test_profiles(self, tmp_path):
        path = tmp_path / 'trace.json'
        row = self.measure('exact', timeline=True, trace=str(path))
        times, sizes = zip(*row['samples'])
        assert list(times) == sorted(times) and times[0] == 0
        # The activations come and go.
        assert max(sizes) > row['activations_mib'] > sizes[-1]
        assert (row['copy_ms'], row['overlapped']) == (0, None)
        assert json.loads(path.read_text())['traceEvents']

    def test_rejects(self):
        with pytest.raises(ValueError, match="got 'large'"):
            self.measure('exact', model='large')
        with pytest.raises(ValueError, match='got device cpu'):
            limit_memory(torch.device('cpu'), 100)

    def test_detector(self):
        row = measure(make_trial(system='L3'))
        assert row['finite'] and row['activations_mib'] > 0

    def test_out_of_memory(self, monkeypatch):
        error = torch.OutOfMemoryError('none left')
        monkeypatch.setattr(Training, 'measure_speed', Mock(side_effect=error))
        assert self.measure('exact')['result'] == OUT_OF_MEMORY
        assert is_out_of_memory(
            RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')
        )
        assert not is_out_of_memory(RuntimeError('shapes differ'))


def test_overlap():
    def event(category, start, end, name='Memcpy DtoH (Device -> Pinned)'):
        return dict(cat=category, name=name, ts=start, dur=end - start)

    events = [
        event('kernel', 1000, 3000),
        event('kernel', 1500, 2000),
        event('kernel', 2000, 4000),
        event('kernel', 6000, 7000),
        event('gpu_memcpy', 0, 2000),
        event('gpu_memcpy', 3500, 6500, 'Memcpy HtoD (Pinned -> Device)'),
        event('gpu_memcpy', 0, 9000, 'Memcpy DtoD (Device -> Device)'),
        event('cpu_op', 0, 9000, 'aten::copy_'),
        dict(name='process_name', ph='M'),
    ]
    assert trace.overlap(events) == dict(
        copy_ms=5.0, kernel_ms=4.0, overlapped=0.4
    )


def test_results(tmp_path):
    trial = make_trial()
    results = Results(Trial, tmp_path / 'new', csv=True)
    assert results.find(trial) is None
    results.put(trial, dict(result=TIMEOUT))
    results.put(trial, dict(result=OK, loss=1.5, samples=[[1, 2]]))
    (row,) = Results(Trial, tmp_path / 'new').rows
    assert row == json.loads(json.dumps(results.find(trial)))
    assert results.trial(row) == trial and row['loss'] == 1.5
    with open(tmp_path / 'new' / 'results.csv') as file:
        (row,) = csv.DictReader(file)
    assert row['loss'] == '1.5' and 'samples' not in row
    assert not list((tmp_path / 'new').glob('*.part'))


class TestPlots:
    def test_throughput(self):
        pytest.importorskip('matplotlib')
        rows = plots.pandas.DataFrame(
            [
                make_row('exact', 4),
                make_row('exact', 2),
                make_row('exact', 16, OUT_OF_MEMORY),
                make_row('exact', 8, OUT_OF_MEMORY),
                make_row('L3', 8, OUT_OF_MEMORY),
            ]
        )
        axes = plots.plot_throughput(rows).axes[0]
        line, cross, nothing, other_cross = axes.lines
        assert list(line.get_xdata()) == [2, 4]
        assert list(line.get_ydata()) == [20, 40]
        assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (8, 40)
        assert len(nothing.get_xdata()) == 0
        assert cross.get_color() != other_cross.get_color()

    def test_files(self, tmp_path):
        pytest.importorskip('matplotlib')
        rows = [make_row(samples=[[0.0, 1.0], [2.0, 3.0]]), make_row('L3')]
        names = {path.name for path in plots.write_plots(rows, tmp_path)}
        assert names == {
            f'retinanet_r18_fpn_1x_coco_{kind}.png'
            for kind in ('throughput', 'memory', 'timeline')
        }
        assert all((tmp_path / name).stat().st_size for name in names)
        failed = [make_row(result=OUT_OF_MEMORY)]
        assert list(plots.write_plots(failed, tmp_path)) == []


class TestArguments:
    def test_trials(self, tmp_path):
        args = train.parse_args(
            ['--models', 'resnet50', RETINANET, '--systems', 'exact',
             'L3+fp32', '--batch-size', '1', '2', '--image-size', '64', '96',
             '--amp', 'bf16', '--trace', 'x', '--cfg-options', *NARROW]
        )  # fmt: skip
        trials = train.make_trials(args)
        assert len(trials) == len({trial.trace for trial in trials}) == 8
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
            (['--plot', '--out=x', '--largest=image-size'],
             'goes with --largest batch, got image-size'),
            (['--plot', '--out=x'], 'mmactnn[benchmark]'),
        ],
    )  # fmt: skip
    def test_rejects(self, argv, message, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, 'matplotlib', None)
        with pytest.raises(SystemExit):
            train.parse_args(argv)
        assert message in capsys.readouterr().err


class TestLargest:
    def find(self, quantity, fits, resolution=16):
        tried = []

        def measure(trial):
            assert trial not in tried
            tried.append(trial)
            return dict(dataclasses.asdict(trial), result=fits(trial))

        trial = make_trial(model='resnet:depth=50')
        row = find_largest(trial, quantity, resolution, measure)
        assert row['quantity'] == quantity
        return row['largest'], row['result'], tried

    @pytest.mark.parametrize('quantity', QUANTITIES)
    def test_quantities(self, quantity):
        def size(trial):
            resnet = models.parse_resnet(trial.model)
            return {
                'batch': trial.batch_size,
                'image-size': trial.image_size[1],
                'depth': resnet['depth'],
                'width': resnet['width'],
            }[quantity]

        largest, result, tried = self.find(
            quantity, lambda t: OK if size(t) <= 200 else OUT_OF_MEMORY
        )
        assert (largest, result) == (192, OK)
        assert size(tried[0]) == {'image-size': 32, 'depth': 64}.get(
            quantity, 16
        )
        assert all(size(trial) % 16 == 0 for trial in tried)

    @pytest.mark.parametrize('limit', [1, 17, 1023])
    def test_limits(self, limit):
        largest, _, tried = self.find(
            'batch',
            lambda t: OK if t.batch_size <= limit else OUT_OF_MEMORY,
            resolution=1,
        )
        assert largest == limit and len(tried) <= 21

    @pytest.mark.parametrize('result', [OUT_OF_MEMORY, TIMEOUT])
    def test_nothing_trains(self, result):
        found = self.find('batch', lambda trial: result)
        assert found[:2] == (None, result) and len(found[2]) == 1


def test_command_line(hungry, tmp_path, monkeypatch, capsys, run_in_fork):
    run_logged = make_run_logged(run_in_fork)
    monkeypatch.setattr('training.process.run_logged', run_logged)
    folder = tmp_path / 'out'
    argv = ['--models', hungry, '--systems', 'exact', '--device', 'cpu']
    argv += ['--image-size', '8', '--warmup', '0', '--steps', '1']
    argv += ['--out', str(folder), '--batch-size']
    train.main([*argv, '4'])
    (row,) = json.loads((folder / 'results.json').read_text())
    assert row['finite'] and row['images_per_s'] > 0
    assert f'{row["images_per_s"]}' in capsys.readouterr().out

    measured = []

    def run(trial, timeout):
        measured.append(trial.batch_size)
        if len(measured) == 1:
            return dict(result=ERROR, message='KeyError: 8', log='all of it')
        return dict(result=OK if trial.batch_size <= 4 else OUT_OF_MEMORY)

    # Results and running out of memory are kept; failures are tried again.
    monkeypatch.setattr(train, 'run_trial', run)
    with pytest.raises(SystemExit, match='batch 8 of 8x8: error KeyError: 8'):
        train.main([*argv, '4', '8', '5'])
    assert measured == [8, 5]
    assert 'all of it' in (folder / 'errors.log').read_text()
    train.main([*argv, '4', '--largest', 'batch', '--resolution', '1'])
    assert measured == [8, 5, 1, 2, 8, 6]
    with open(folder / 'largest.csv') as file:
        (row,) = csv.DictReader(file)
    assert (row['quantity'], row['largest']) == ('batch', '4')


class TestProcess:
    def test_environment_and_log(self, monkeypatch):
        # The process is not started: a level says what it lacks itself.
        given = {}

        async def run_logged(command, environment, log, timeout):
            given.update(environment)
            log.write_text('all of it')
            return dict(result=ERROR, message='it')

        monkeypatch.setattr('training.process.run_logged', run_logged)
        row = run_trial(make_trial(system='L5'))
        assert row == dict(result=ERROR, message='it', log='all of it')
        assert 'expandable_segments:True' in given['PYTORCH_ALLOC_CONF']

    def test_timeout(self, hungry):
        trial = make_trial(model=hungry, cfg_options=(), batch_size=9)
        assert run_trial(trial, timeout=0.3)['result'] == TIMEOUT
