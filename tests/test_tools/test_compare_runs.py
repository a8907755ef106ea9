"""Tests of tools/analysis_tools/compare_runs.py."""

import json

import pytest
from support.tools import load_tool

from run_log import choose_metric

compare_runs = load_tool('analysis_tools/compare_runs.py')


def write_run(work_dir, part, losses, val=None, start=1, **scalars):
    """Write the scalars of a part of a run as MMEngine does."""
    lines = [
        dict(loss=loss, time=0.5, epoch=1, step=step, **scalars)
        for step, loss in enumerate(losses, start)
    ]
    lines.append({'step': 1, 'time': 2.0, **(val or {'coco/bbox_mAP': 0.25})})
    path = work_dir / part / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def actnn(saved):
    return {
        'actnn/saved_mib': saved,
        'actnn/ratio': 800 / saved,
        'actnn/layers_ratio': 1600 / saved,
        'actnn/peak_mib': 1000 + saved,
    }


def render(exact, ours, capsys, *options):
    """Rows of the table, and the notices."""
    compare_runs.main([str(exact), str(ours), *options])
    out, err = capsys.readouterr()
    cells = [
        [cell.strip() for cell in line.split('│')] for line in out.splitlines()
    ]
    return {c[1]: c[2:4] for c in cells if len(c) == 5}, err


def test_table(tmp_path, capsys):
    write_run(tmp_path / 'exact', '1', [9.0, *[1.0] * 10], **actnn(800))
    write_run(tmp_path / 'ours', '1', [9.0, *[1.5] * 10], **actnn(100))
    rows, notices = render(tmp_path / 'exact', tmp_path / 'ours', capsys)
    assert rows == {
        'activations kept (MiB)': ['800.0', '100.0'],
        'ratio, whole model': ['1.00', '8.00'],
        'ratio, its Q layers': ['2.00', '16.00'],
        'peak memory (MiB)': ['1800.0', '1100.0'],
        'final loss': ['1.0000', '1.5000'],
        'time per iteration (s)': ['0.500', '0.500'],
        'coco/bbox_mAP, epoch 1': ['0.250', '0.250'],
    }
    assert notices == ''


def test_resumed_and_killed_run(tmp_path, capsys):
    exact, ours = tmp_path / 'exact', tmp_path / 'ours'
    write_run(exact, '1', [6.0, 2.0], **actnn(400))
    # Resumed after the first step: what followed it does not count.
    write_run(ours, '20260101', [3.0, 9.0, 9.0], {'mIoU': 1.0})
    path = write_run(ours, '20260102', [4.0], {'step': 2, 'mIoU': 2.0}, 2)
    with open(path, 'a') as file:
        file.write('{"loss": 1.0, "st')
    rows, notices = render(exact, ours, capsys)
    assert rows['final loss'] == ['4.0000', '3.5000']
    assert rows['activations kept (MiB)'] == ['400.0', '-']
    assert f'line 3 of {path} is left out' in notices
    assert 'no metric of an evaluation in common' in notices

    # Begun anew, and not come as far.
    write_run(ours, '20260103', [5.0], {'aAcc': 7.0, 'mIoU': 3.0})
    rows, notices = render(exact, ours, capsys)
    assert rows['final loss'] == ['6.0000', '5.0000']
    assert 'compared up to 1' in notices
    rows, _ = render(ours, ours, capsys)
    assert rows['mIoU, epoch 1'] == ['3.000', '3.000']
    rows, _ = render(ours, ours, capsys, '--metric', 'aAcc')
    assert rows['aAcc, epoch 1'] == ['7.000', '7.000']


def test_chosen_metric():
    names = ['data/loss_bbox', 'pascal_voc/mAP', 'accuracy/top1']
    assert choose_metric(names) == 'pascal_voc/mAP'
    assert choose_metric(['accuracy/top5', 'accuracy/top1']) == 'accuracy/top1'
    assert choose_metric(['PSNR', 'SSIM']) == 'PSNR'
    assert choose_metric([]) is None


@pytest.mark.parametrize(
    'other, options, message',
    [
        ('nowhere', [], 'nowhere must be the work directory'),
        ('empty', [], 'empty must be the work directory'),
        ('run', ['--metric', 'mIoU'], "one of coco/bbox_mAP, got 'mIoU'"),
    ],
)
def test_usage(tmp_path, capsys, other, options, message):
    write_run(tmp_path / 'run', '1', [1.0])
    write_run(tmp_path / 'empty', '1', [])
    with pytest.raises(SystemExit) as error:
        render(tmp_path / 'run', tmp_path / other, capsys, *options)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
