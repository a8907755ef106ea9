"""Tests of tools/benchmark/swap.py."""

import json

import pytest
import torch
from support.tools import load_tool

swap = load_tool('benchmark/swap.py')

SMALL = ['--batch-size', '2', '--image-size', '64', '--steps', '1']


def event(category, start, end, name='Memcpy DtoH (Device -> Pinned)'):
    return dict(cat=category, name=name, ts=start, dur=end - start)


def test_overlap():
    events = [
        event('kernel', 1000, 3000),
        event('kernel', 2000, 4000),
        event('kernel', 6000, 7000),
        event('gpu_memcpy', 0, 2000),
        event('gpu_memcpy', 3500, 6500, 'Memcpy HtoD (Pinned -> Device)'),
        event('gpu_memcpy', 0, 9000, 'Memcpy DtoD (Device -> Device)'),
        event('cpu_op', 0, 9000, 'aten::copy_'),
        dict(name='process_name', ph='M'),
    ]
    assert swap.overlap(events) == dict(
        copy_ms=5.0, kernel_ms=4.0, overlapped=0.4
    )
    assert swap.overlap(events[:3])['overlapped'] is None


@pytest.mark.parametrize('mode', swap.MODES)
def test_measure(mode):
    if not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    row = swap.measure(mode, swap.parse_args(SMALL))
    assert row['mode'] == mode and row['img_s'] > 0
    assert (row['host_mib'] > 0) == (mode != 'exact')
    assert row['result'].startswith('loss ')


def test_trace(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    path = tmp_path / 'trace.json'
    result = swap.trace(swap.parse_args([*SMALL, '--trace', str(path)]))
    assert result['copy_ms'] > 0 and 0 <= result['overlapped'] <= 1
    names = {
        e.get('name') for e in json.loads(path.read_text())['traceEvents']
    }
    assert {'mmactnn: swap out', 'mmactnn: swap in'} <= names


def test_no_gpu(monkeypatch):
    monkeypatch.setattr('sys.argv', ['swap.py'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='no GPU'):
        swap.main()
