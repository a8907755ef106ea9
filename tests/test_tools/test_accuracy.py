"""Tests of tools/benchmark/accuracy.py and its parts."""

import asyncio
import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from support.forks import make_run_logged
from support.tools import ROOT, load_tool

pytest.importorskip('pandas')

from comparison import plots, run, schedule  # noqa: E402
from comparison.run import Run  # noqa: E402
from comparison.summary import summarize  # noqa: E402
from shared.results import (  # noqa: E402
    ERROR,
    OK,
    TIMEOUT,
    UNFINISHED,
    Results,
)

accuracy = load_tool('benchmark/accuracy.py')

# Stands for tools/train.py: does what the config, a file, says, or the base of
# the config; and logs how it was called.
TRAINING = """
import ast, json, os, pathlib, sys, time
config, work_dir = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3])
options = dict(o.split('=') for o in sys.argv[6:])
assert sys.argv[4:6] == ['--resume', '--cfg-options']
if config.parent == work_dir.parent:
    base, _, level = config.read_text().splitlines()
    config = pathlib.Path(ast.literal_eval(base.split(' = ')[1]))
    options['level'] = ast.literal_eval(level.split(' = ')[1])
with open(config.with_name('calls'), 'a') as file:
    gpu = os.environ['CUDA_VISIBLE_DEVICES']
    file.write(json.dumps([config.stem, gpu, options]) + '\\n')
what = config.read_text()
print('some line')
if what == 'fail':
    sys.exit('no data')
if what == 'hang':
    time.sleep(60)
seed, level = int(options['randomness.seed']), options.get('level')
part = work_dir / '1' / 'vis_data'
part.mkdir(parents=True)
lines = [dict(loss=3 - seed, step=10, epoch=1)]
if what != 'blind':
    lines.append(dict(mIoU=70 + seed - (level == 'L3') / 2, step=1))
(part / 'scalars.json').write_text('\\n'.join(map(json.dumps, lines)))
(work_dir / 'last_checkpoint').write_text('/elsewhere/epoch_1.pth')
"""

# As small as what tools/train.py can train.
TINY = """
default_scope = 'mmengine'
custom_imports = dict(imports=['tiny'], allow_failed_imports=False)
model = dict(type='Tiny')
loader = dict(dataset=dict(type='Ramp'), batch_size=4, sampler=dict(
    type='DefaultSampler', shuffle=False))
train_dataloader = val_dataloader = loader
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
val_evaluator = dict(type='Last')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
custom_hooks = [dict(type='mmactnn.ActNNHook', level='L3')]
"""
TINY_PARTS = """
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS

@MODELS.register_module()
class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))

    def forward(self, images, mode):
        means = self.layers(torch.stack(images)).mean((1, 2, 3))
        if mode == 'loss':
            return dict(loss=means.square().mean())
        return list(means)

@DATASETS.register_module()
class Ramp(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(images=torch.full((3, 32, 32), index / 8))

@METRICS.register_module()
class Last(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += map(float, data_samples)

    def compute_metrics(self, results):
        return dict(mIoU=results[-1])
"""


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Write configs that the training above reads."""
    script = tmp_path / 'train.py'
    script.write_text(TRAINING)
    monkeypatch.setattr(run, '_TRAIN', script)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f'{name}.py').write_text(text)
        return [str(tmp_path / f'{name}.py') for name in texts]

    return write


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / 'calls').open()]


def compare(tmp_path, *arguments, fails=False):
    """Run the tool; return its results."""
    out = tmp_path / 'out'
    with (
        contextlib.suppress(SystemExit) if fails else contextlib.nullcontext()
    ):
        accuracy.main([*arguments, '--out', str(out)])
        assert not fails
    return json.loads((out / 'results.json').read_text())


def make_row(level='L0', seed=0, evaluations=(), losses=((1, 2.0),), **more):
    row = dict(
        config='configs/small.py',
        level=level,
        seed=seed,
        options=[],
        probe=None,
        result=OK,
        metric='mIoU',
        unit='epoch',
        evaluations=[list(pair) for pair in evaluations],
        losses=[list(pair) for pair in losses],
        saved_mib={'L0': 80.0, 'L3': 10.0}[level],
    )
    return {**row, **more}


class TestTool:
    def test_all_runs_are_trained_once(self, configs, tmp_path, capsys):
        small, large = configs(small='', large='')
        command = [small, large, '--seeds', '0', '1', '--gpus', '2',
                   '--cfg-options', 'a.b=1']  # fmt: skip
        rows = compare(tmp_path, *command)
        assert [row['result'] for row in rows] == [OK] * 8
        called = calls(tmp_path)
        options = [options for name, _, options in called if name == 'small']
        assert all(o['a.b'] == '1' for o in options)
        assert {(o['level'], o['randomness.seed']) for o in options} == {
            (level, seed) for level in ('L0', 'L3') for seed in '01'
        }
        assert {gpu for _, gpu, _ in called} == {'0', '1'}
        text = capsys.readouterr().out
        assert text.count('-0.500') == 2
        assert 'not trained to the end' not in text

        assert compare(tmp_path, *command) == rows
        assert compare(tmp_path, '--plot') == rows
        assert len(calls(tmp_path)) == 8
        assert (tmp_path / 'out' / 'small_accuracy.png').stat().st_size
        lines = (tmp_path / 'out' / 'table.md').read_text().splitlines()
        assert lines[3] == (
            '| small | mIoU | epoch 1 | L3 | 69.500 | 70.500 | 70.000 | 1.000 '
            '| -0.500 |  |'
        )
        assert capsys.readouterr().out.count('-0.500') == 4

    def test_probe(self, configs, tmp_path):
        blind, other, probe = configs(blind='blind', other='', probe='')
        rows = compare(
            tmp_path, blind, other, '--probe', blind, probe, '--seeds', '2',
            '--gpus', '0', '--cfg-options', 'a.b=1',
        )  # fmt: skip
        assert [row['evaluations'] for row in rows[:2]] == [[[1, 72]]] * 2
        assert [row['losses'] for row in rows[:2]] == [[[10, 1]]] * 2
        probed = [o for name, _, o in calls(tmp_path) if name == 'probe']
        assert probed == [
            {
                'randomness.seed': '2',
                'model.backbone.init_cfg.checkpoint': str(
                    tmp_path / 'out' / f'blind_{level}_2' / 'epoch_1.pth'
                ),
            }
            for level in ('L0', 'L3')
        ]

    def test_failures_are_tried_again(self, configs, tmp_path, capsys):
        command = configs(small='fail') + ['--seeds', '0', '--gpus', '0']
        for row in compare(tmp_path, *command, fails=True):
            assert (row['result'], row['message']) == (ERROR, 'no data')
        # A report trains nothing that could fail.
        assert len(compare(tmp_path)) == 2
        assert 'L3 seed 0: error (no data)' in capsys.readouterr().out
        configs(small='')
        for row in compare(tmp_path, *command):
            assert (row['result'], row['message']) == (OK, None)

    def test_timeout(self, configs, tmp_path):
        (row,) = compare(
            tmp_path, *configs(small='hang'), '--seeds', '0', '--levels', 'L0',
            '--gpus', '0', '--timeout', '0.5', fails=True,
        )  # fmt: skip
        assert (row['result'], row['losses']) == (TIMEOUT, [])

    def test_limit(self, configs, tmp_path, capsys):
        """The first run is stopped, the second does not begin."""
        command = [
            *configs(small='hang'), '--seeds', '0', '--gpus', '0',
            '--levels', 'L0', 'L3',
        ]  # fmt: skip
        rows = compare(tmp_path, *command, '--limit', '1')
        assert [row['result'] for row in rows] == [UNFINISHED] * 2
        assert [o['level'] for _, _, o in calls(tmp_path)] == ['L0']
        text = capsys.readouterr().out
        assert 'small.py L0 seed 0: unfinished' in text
        # Another day.
        configs(small='')
        rows = compare(tmp_path, *command)
        assert [row['result'] for row in rows] == [OK] * 2
        assert len(calls(tmp_path)) == 3

    def test_level_that_differs_from_one_by_name(self, configs, tmp_path):
        level = 'L3:{"norm": 4, "rules": {"neck.*bn": null}}'
        (row,) = compare(
            tmp_path, *configs(small=''), '--levels', level, '--seeds', '0',
            '--gpus', '0',
        )  # fmt: skip
        assert (row['level'], row['result']) == (level, OK)
        ((_, _, options),) = calls(tmp_path)
        rules = {'neck.*bn': None}
        assert options['level'] == dict(base='L3', norm=4, rules=rules)

    def test_bounds(self, configs, tmp_path, capsys):
        command = [*configs(small=''), '--seeds', '0', '--gpus', '0']
        for value, within in (('0.5', 'yes'), ('0.4', 'no')):
            compare(tmp_path, *command, '--bounds', f'small={value}')
            table = (tmp_path / 'out' / 'table.md').read_text()
            assert f'| -0.500 | {value}00 | {within} |' in table
        compare(tmp_path, '--bounds', 'large=1')
        text = capsys.readouterr().out
        assert 'no results for the bound of large' in text

    def test_interrupt_ends_trainings(self, configs, tmp_path):
        runs = [Run(config, 'L0', 0) for config in configs(a='hang', b='hang')]
        logs = [tmp_path / run.name / 'log.txt' for run in runs]

        async def train(run, slot):
            await run.train(tmp_path, slot)

        async def interrupt():
            slots = schedule.make_slots(0, 2)
            task = asyncio.create_task(schedule.train_all(runs, slots, train))
            while not all(map(training_processes, logs)):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Killed, but perhaps not gone yet.
            while any(map(training_processes, logs)):
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(interrupt(), 30))

    def test_real_training(self, tmp_path, monkeypatch, run_in_fork):
        (tmp_path / 'tiny.py').write_text(TINY_PARTS)
        config = tmp_path / 'config.py'
        config.write_text(TINY)
        monkeypatch.setenv('PYTHONPATH', f'{ROOT}:{tmp_path}')
        monkeypatch.setattr(run, 'run_logged', make_run_logged(run_in_fork))
        command = [
            str(config), '--seeds', '1', '--levels', 'L3', '--gpus', '0',
        ]  # fmt: skip
        (row,) = compare(tmp_path, *command)
        assert row['result'] == OK, row['message']
        assert [step for step, _ in row['losses']] == [1, 2]
        assert [step for step, _ in row['evaluations']] == [1]
        assert row['unit'] == 'epoch'
        assert row['exact_mib'] > 2 * row['saved_mib'] > 0

        # As if it had been killed before its last evaluation.
        out = tmp_path / 'out'
        (scalars,) = out.glob('*/*/vis_data/scalars.json')
        first, second, _ = scalars.read_text().splitlines(True)
        scalars.write_text(first + second)
        (out / 'results.json').write_text(
            json.dumps([{**row, 'result': UNFINISHED}])
        )
        assert compare(tmp_path, *command) == [row]


def training_processes(log):
    """Processes that write to a log."""
    found = []
    for path in Path('/proc').glob('[0-9]*/fd/1'):
        try:
            found += [path] if path.readlink() == log else []
        except OSError:
            continue
    return found


class TestArguments:
    @pytest.mark.parametrize(
        'argv, message',
        [
            (['nowhere.py'], "must be a file, got 'nowhere.py'"),
            ([__file__, __file__], 'names of their own'),
            (['--probe', 'other.py', __file__], 'must follow a config'),
            (['--per-gpu', '0'], 'per_gpu must be 1 or more'),
            (['--limit', '0'], 'limit must be 1 or more, got 0'),
            (['--bounds', 'small'], "invalid bound value: 'small'"),
            (['--levels', 'L9'], "--levels L9: level must be .* got 'L9'"),
            (['--levels', 'L3:[1]'], r'--levels L3:\[1\]: '),
            (['--levels', 'L3:{"cnv": 4}'], "'cnv'"),
        ],
    )
    def test_rejects(self, argv, message, capsys):
        with pytest.raises(SystemExit):
            accuracy.parse_args(argv)
        assert re.search(message, capsys.readouterr().err)

    def test_other_settings_need_another_folder(self, tmp_path):
        results = Results(Run, tmp_path)
        first = Run('a/small.py', 'L0', 0, ('x=1',))
        more = [first, Run('a/small.py', 'L0', 1)]
        assert accuracy.begin([first], results) == [first]
        again = Results(Run, tmp_path)
        assert accuracy.begin(more, again) == more
        other = Run('b/small.py', 'L0', 0, ('x=1',))
        with pytest.raises(ValueError, match='need another folder'):
            accuracy.begin([other], again)


class TestSlots:
    def test_neighbours_are_on_different_gpus(self, monkeypatch):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,6,7')
        monkeypatch.setenv('OMP_NUM_THREADS', '3')
        slots = schedule.make_slots(2, 2)
        gpus = [slot['CUDA_VISIBLE_DEVICES'] for slot in slots]
        assert gpus == ['4', '6', '4', '6']
        assert {slot['OMP_NUM_THREADS'] for slot in slots} == {'3'}
        with pytest.raises(ValueError, match="4 GPUs, got '4,6,7'"):
            schedule.make_slots(4, 1)

    def test_threads_are_shared_out(self, monkeypatch):
        monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
        monkeypatch.setattr(os, 'cpu_count', lambda: 8)
        slots = schedule.make_slots(0, 3)
        assert [slot['OMP_NUM_THREADS'] for slot in slots] == ['2'] * 3

    def test_as_many_trainings_as_slots(self):
        running, most = [], []

        async def train(run, slot):
            running.append(slot)
            most.append(len(running))
            assert len(set(running)) == len(running)
            await asyncio.sleep(0)
            running.remove(slot)

        asyncio.run(schedule.train_all(range(6), ['a', 'b', 'c'], train))
        assert len(most) == 6 and max(most) == 3


class TestSummary:
    def test_last_common_evaluation(self):
        rows = [
            make_row('L0', 0, [(10, 1.0), (20, 4.0), (30, 9.0)]),
            make_row('L3', 0, [(10, 1.0), (20, 3.0)], result=TIMEOUT),
            make_row('L0', 1, [(10, 1.0), (20, 6.0)], result=TIMEOUT),
            make_row('L3', 1, [(10, 1.0), (20, 6.0), (30, 9.0)]),
        ]
        (summary,) = summarize(rows)
        assert summary.seeds == [0, 1]
        assert list(summary.evaluations['L3'].index) == [10, 20]
        common = dict(config='small', metric='mIoU', at='epoch 20')
        exact, ours = summary.table()
        assert exact == {
            **common, 'level': 'L0', 'seed 0': 4.0, 'seed 1': 6.0,
            'mean': 5.0, 'spread': 2.0, 'activations, MiB': 80.0,
        }  # fmt: skip
        assert (ours['mean'], ours['difference']) == (4.5, -0.5)

    def test_seeds_that_were_cut_are_left_out(self):
        rows = [
            make_row('L0', 0, [(10, 1.0)]),
            make_row('L3', 0, [(10, 3.0)]),
            make_row('L0', 1, [(10, 1.0)]),
            make_row('L3', 1),
            dict(config='small.py', level='L0', seed=2, result=UNFINISHED),
        ]
        (summary,) = summarize(rows)
        assert summary.seeds == [0]
        assert [row['mean'] for row in summary.table()] == [1.0, 3.0]

    def test_finished_seeds_count_if_there_are_any(self):
        rows = [
            make_row(level, seed, [(1, 5.0 * seed)], result=result)
            for seed, result in enumerate((OK, UNFINISHED, OK))
            for level in ('L0', 'L3')
        ]
        (summary,) = summarize(rows)
        assert summary.seeds == [0, 2]

    def test_bound(self):
        rows = [
            make_row(level, 0, [(1, value)])
            for level, value in (('L0', 0.577), ('L3', 0.567))
        ]
        (summary,) = summarize(rows)
        for bound, within in ((0.01, 'yes'), (0.009, 'no')):
            exact, ours = summary.table(bound)
            assert 'bound' not in exact
            assert (ours['bound'], ours['within']) == (bound, within)

    def test_without_evaluations(self):
        (summary,) = summarize([make_row('L0'), make_row('L3')])
        assert 'mean' not in summary.table()[0]
        assert summary.losses['L3', 0].to_dict() == {1: 2.0}
        assert summarize([]) == []
        assert summarize([make_row('L0'), make_row('L3', losses=[])]) == []


class TestPlots:
    def summary(self, **evaluations):
        rows = [
            make_row(
                level,
                seed,
                [(10, seed + 0.25), (20, seed + 2.0)] if evaluated else [],
                losses=[(1, 4.0 + seed), (2, 2.0 + seed)],
            )
            for level, evaluated in evaluations.items()
            for seed in (0, 1, 2)
        ]
        (summary,) = summarize(rows)
        return summary

    def test_mean_and_band(self):
        pytest.importorskip('matplotlib')
        losses, metric = plots.plot(self.summary(L0=True, L3=True)).axes
        assert [line.get_label() for line in metric.lines] == ['L0', 'L3']
        for axes, x, y in (
            (losses, [1, 2], [5.0, 3.0]),
            (metric, [10, 20], [1.25, 3.0]),
        ):
            for line, band in zip(axes.lines, axes.collections, strict=True):
                assert list(line.get_xdata()) == x
                assert list(line.get_ydata()) == y
                (path,) = band.get_paths()
                heights = path.vertices[:, 1]
                assert (heights.min(), heights.max()) == (
                    min(y) - 1,
                    max(y) + 1,
                )
        assert (metric.get_xlabel(), metric.get_ylabel()) == ('epoch', 'mIoU')

    def test_without_evaluations(self):
        pytest.importorskip('matplotlib')
        summary = self.summary(L0=False, L3=False)
        assert len(plots.plot(summary).axes) == 1
