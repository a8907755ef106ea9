"""The benchmarks measure what they say, on a model of no size."""

import json
import sys
import types

import pytest
import torch
from support.tools import load_tool
from torch import nn

from mmactnn import ops

pytest.importorskip('pandas')


class Small(nn.Module):
    """With a parameter of every kind that ResNet-50 has."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 1000)

    def forward(self, x):
        x = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def torchvision(monkeypatch):
    models = types.SimpleNamespace(resnet50=Small)
    module = types.SimpleNamespace(models=models)
    monkeypatch.setitem(sys.modules, 'torchvision', module)


def test_gradient_error():
    tool = load_tool('benchmark/gradient_error.py')
    args = tool.parse_args(
        '--device cpu --batch-size 4 --image-size 32 --draws 4'.split()
    )
    exact = tool.gradients(*tool.build_task(args))
    assert tool.relative(exact, exact, ['conv1.weight', 'fc.bias']) == 0
    double = {name: 2 * vector for name, vector in exact.items()}
    assert tool.relative(double, exact) == pytest.approx(1)
    assert tool.relative_of_tensors(double, exact) == pytest.approx(1)
    fixed, followed = 'L2:{"conv":2,"norm":2}', 'L3:{"use_gradient":true}'
    rotated = 'L2:{"conv":2,"norm":2,"rounding":"rotated"}'
    rows = {
        level: tool.measure(args, level, exact)
        for level in ('L2', fixed, followed, rotated)
    }
    errors = {level: row['error'] for level, row in rows.items()}
    assert 0 < 2 * errors['L2'] < errors[fixed]
    assert errors[rotated] < errors[fixed]
    assert rows['L2']['mean'] < errors['L2']
    assert 'bits' not in rows['L2']
    assert 0 < rows['L2']['kinds']['Conv2d.weight'] < rows['L2']['tensors']
    # The rest is fused.
    assert set(rows[followed]['bits']) == {'conv2', 'fc'}
    assert torch.tensor([row['ratio'] for row in rows.values()]).gt(3).all()


def test_gradient_error_names_what_failed(monkeypatch, capsys):
    tool = load_tool('benchmark/gradient_error.py')

    def measure(args, name, *_):
        return dict(level=name, error=1 / (name != 'L1'))

    monkeypatch.setattr(tool, 'measure', measure)
    options = '--device cpu --batch-size 2 --image-size 32 --levels L1 L2'
    with pytest.raises(SystemExit, match='L1: ZeroDivisionError') as error:
        tool.main(options.split())
    assert error.value.code and 'L2' in capsys.readouterr().out


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('gradient_error', ['--levels', 'exact'], "got 'exact'"),
        ('gradient_error', ['--group-size', '100'], '100'),
        (
            'gradient_error',
            ['--group-size', '64', '--levels', 'L2', 'L3S'],
            'group_size of L3S must be 256',
        ),
        ('host_time', ['--turns', '0'], 'must be 1 or more, got 0'),
    ],
)
def test_rejects(name, options, message, capsys):
    tool = load_tool(f'benchmark/{name}.py')
    with pytest.raises(SystemExit):
        tool.parse_args(options)
    assert message in capsys.readouterr().err


SMALL_RETINANET = (
    'model.backbone.base_channels=4',
    'model.neck.in_channels=[16,32,64,128]',
    'model.neck.out_channels=8',
    'model.bbox_head.in_channels=8',
    'model.bbox_head.feat_channels=8',
)


def test_host_time(tmp_path, monkeypatch, capsys):
    tool = load_tool('benchmark/host_time.py')
    out = tmp_path / 'rows.json'
    turns = []
    timed_step = tool.Training.timed_step
    monkeypatch.setattr(
        tool.Training,
        'timed_step',
        lambda training: (
            turns.append(training.trial.system) or timed_step(training)
        ),
    )
    with pytest.raises(SystemExit, match='failed:\n  broken: ValueError'):
        tool.main(
            [
                *('--model', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
                *('--device', 'cpu', '--batch-size', '1', '--warmup', '0'),
                *('--image-size', '64', '64', '--turns', '2', '--steps', '1'),
                *('--systems', 'exact', 'broken', 'L3'),
                *('--cfg-options', *SMALL_RETINANET, '--out', str(out)),
            ]
        )
    assert turns == ['exact', 'L3'] * 2
    result = json.loads(out.read_text())
    exact, compressed = result['rows']
    assert (exact['system'], compressed['system']) == ('exact', 'L3')
    assert exact['ratio'] == 1
    assert compressed['ratio'] == compressed['step'] / exact['step']
    for row in result['rows']:
        # A CPU is done when the call is.
        assert 0 < row['host'] <= row['step'] < row['host'] + 50
        assert row['25 %'] <= row['step'] <= row['75 %']
    assert 'batch 1' in capsys.readouterr().out


@pytest.mark.parametrize('rounding', ops.ROUNDINGS)
def test_kernel_speed(rounding, monkeypatch):
    tool = load_tool('benchmark/kernel_speed.py')

    def median_ms(function, written):
        function()
        return 1.0

    monkeypatch.setattr(tool, 'median_ms', median_ms)

    def stop(x, random):
        drawn = random.decoding['drawn']
        assert bool(drawn) == (rounding != 'stochastic')
        assert random.encoding['rotated'] == (rounding == 'rotated')
        yield 'first', [x], [x], lambda: None
        raise RuntimeError('no such kernel')

    monkeypatch.setattr(tool, 'CASES', (*tool.CASES, stop))
    failures, shape = {}, (2, 8, 16, 16)
    setting = shape, torch.float32, True, failures, rounding
    rows = list(tool.measure(*setting, device='cpu'))
    shares = {row['kernel']: row['share'] for row in rows}
    assert len(shares) == len(rows) > 60
    assert shares['dropout'] == shares['first'] == 1
    assert shares['relu forward in place'] == 1.016
    assert shares['norm add relu 8 bit'] > 1.5
    assert failures == {
        'stop [2, 8, 16, 16] float32 channels_last': (
            'RuntimeError: no such kernel'
        )
    }
