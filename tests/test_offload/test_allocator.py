"""Expandable segments are asked for in the environment, or in force."""

import os
import subprocess
import sys

import pytest
import torch

from mmactnn.offload.allocator import require_expandable_segments

NEW, OLD = 'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'


@pytest.fixture
def fresh_gpu(monkeypatch):
    """A process that has a GPU but has not used it yet."""
    for name in (NEW, OLD):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: False)
    monkeypatch.setattr(torch.cuda, 'get_allocator_backend', lambda: 'native')
    return monkeypatch


@pytest.mark.parametrize('name', [NEW, OLD])
@pytest.mark.parametrize(
    'value',
    [
        'expandable_segments:True',
        'max_split_size_mb:64,expandable_segments:True',
        ' expandable_segments : True , garbage_collection_threshold:0.8',
        'expandable_segments:False,expandable_segments:True',
    ],
)
def test_environment(name, value, fresh_gpu):
    fresh_gpu.setenv(name, value)
    require_expandable_segments()


@pytest.mark.parametrize(
    'value',
    [
        'expandable_segments:False',
        'max_split_size_mb:64',
        'expandable_segments:True,expandable_segments:False',
    ],
)
def test_environment_without(value, fresh_gpu):
    fresh_gpu.setenv(OLD, value)
    with pytest.raises(RuntimeError) as error:
        require_expandable_segments()
    message = str(error.value)
    assert f'{OLD} is {value!r}' in message
    assert f'{NEW}=expandable_segments:True' in message
    assert 'before the process starts' in message
    assert 'reserved than allocated' in message


def test_newer_name_goes_first(fresh_gpu):
    fresh_gpu.setenv(NEW, 'max_split_size_mb:64')
    fresh_gpu.setenv(OLD, 'expandable_segments:True')
    with pytest.raises(RuntimeError, match=f'{NEW} is'):
        require_expandable_segments()


def test_nothing_is_set(fresh_gpu):
    with pytest.raises(RuntimeError, match=f'neither {NEW} nor {OLD} is set'):
        require_expandable_segments()


def test_settings_in_force_go_before_the_environment(fresh_gpu):
    fresh_gpu.setattr(torch.cuda, 'is_initialized', lambda: True)
    settings = dict(expandable_segments=False)
    fresh_gpu.setattr(
        torch.cuda.memory,
        '_snapshot',
        lambda: dict(allocator_settings=settings),
    )
    fresh_gpu.setenv(NEW, 'expandable_segments:True')
    with pytest.raises(RuntimeError, match='runs without them'):
        require_expandable_segments()
    settings['expandable_segments'] = True
    fresh_gpu.delenv(NEW)
    require_expandable_segments()


def test_other_backend(fresh_gpu):
    fresh_gpu.setattr(
        torch.cuda, 'get_allocator_backend', lambda: 'cudaMallocAsync'
    )
    fresh_gpu.setenv(NEW, 'expandable_segments:True')
    with pytest.raises(RuntimeError, match="backend is 'cudaMallocAsync'"):
        require_expandable_segments()


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(RuntimeError, match='no CUDA device is available'):
        require_expandable_segments()


@pytest.mark.parametrize('enabled', [True, False])
@pytest.mark.parametrize('used', [True, False])
def test_real_process(enabled, used):
    if not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    lines = [
        'import torch',
        'from mmactnn.offload.allocator import require_expandable_segments',
        'torch.ones(1, device="cuda")' if used else '',
        'require_expandable_segments()',
    ]
    env = {k: v for k, v in os.environ.items() if k not in (NEW, OLD)}
    if enabled:
        env[NEW] = 'expandable_segments:True'
    done = subprocess.run(
        [sys.executable, '-c', '\n'.join(lines)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == enabled, done.stderr
    if not enabled:
        assert 'expandable segments are needed' in done.stderr
