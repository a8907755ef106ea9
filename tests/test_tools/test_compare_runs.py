"""Tests of tools/analysis_tools/compare_runs.py."""

import json

import pytest
from support.tools import load_tool

compare_runs = load_tool('analysis_tools/compare_runs.py')


def write_run(work_dir, stamp, losses, val=None, **scalars):
    """Write the scalars of a run as MMEngine does."""
    lines = [
        dict(loss=loss, time=0.5, iter=i, step=i, **scalars)
        for i, loss in enumerate(losses)
    ]
    lines.append({'coco/bbox_mAP': 0.25} if val is None else val)
    path = work_dir / stamp / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def actnn(saved):
    return {
        'actnn/saved_mib': saved,
        'actnn/ratio': 800 / saved,
        'actnn/layers_ratio': 1600 / saved,
        'actnn/peak_mib': 1000 + saved,
    }


def render(exact, ours, capsys):
    compare_runs.main([str(exact), str(ours)])
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split('│')]
        if len(cells) == 5:
            rows[cells[1]] = cells[2:4]
    return rows


def test_table(tmp_path, capsys):
    write_run(tmp_path / 'exact', '1', [9.0, *[1.0] * 10], **actnn(800))
    write_run(tmp_path / 'ours', '1', [9.0, *[1.5] * 10], **actnn(100))
    rows = render(tmp_path / 'exact', tmp_path / 'ours', capsys)
    assert rows == {
        'activations kept (MiB)': ['800.0', '100.0'],
        'ratio, whole model': ['1.00', '8.00'],
        'ratio, its Q layers': ['2.00', '16.00'],
        'peak memory (MiB)': ['1800.0', '1100.0'],
        'final loss': ['1.0000', '1.5000'],
        'time per iteration (s)': ['0.500', '0.500'],
        'bbox mAP': ['0.250', '0.250'],
    }


def test_newest_run_counts(tmp_path, capsys):
    for stamp, loss in (('20260101_000000', 3.0), ('20260102_000000', 2.0)):
        write_run(tmp_path, stamp, [loss], **actnn(400))
    rows = render(tmp_path, tmp_path, capsys)
    assert rows['final loss'] == ['2.0000', '2.0000']


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='scalars.json in .*nowhere'):
        compare_runs.main([str(tmp_path / 'nowhere'), str(tmp_path)])


def test_run_without_the_hook(tmp_path):
    write_run(tmp_path, '1', [1.0])
    with pytest.raises(KeyError, match="no 'actnn/saved_mib'; it holds iter"):
        compare_runs.main([str(tmp_path), str(tmp_path)])


def test_run_without_evaluation(tmp_path):
    write_run(tmp_path, '1', [1.0], val={'step': 1}, **actnn(400))
    with pytest.raises(KeyError, match="no 'coco/bbox_mAP'; it holds step"):
        compare_runs.main([str(tmp_path), str(tmp_path)])
