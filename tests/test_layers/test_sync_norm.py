"""QSyncBatchNorm in two processes against one with the whole batch."""

import functools

import pytest
import torch
from support.layers import (
    FLOAT32_ERROR,
    assert_same_bits,
    gradients,
    relative_error,
)
from support.pairs import in_turn
from support.processes import run_in_processes
from support.sync_norm_cases import (
    CASES,
    CHANNELS,
    make_data,
    run_all,
    run_case,
    run_in_one,
    set_state,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmactnn import QSyncBatchNorm

# One start of processes serves all tests of a device.
start_two_processes = functools.cache(
    lambda device: run_in_processes(run_all, 2, device, device)
)
start_one_process = functools.cache(
    lambda device: run_in_processes(run_in_one, 1, device, device)[0]
)


def in_two_processes(device):
    if device == 'cuda' and torch.cuda.device_count() < 2:
        pytest.skip('NCCL wants a GPU for each of two processes')
    return start_two_processes(device)


def in_one_process(case):
    """Torch's batch normalisation of the whole batch, in float64."""
    rank = len(case.get('size', (6, 7)))
    cls = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[
        rank
    ]
    norm = cls(CHANNELS, dtype=torch.float64, **case.get('kwargs', {}))
    set_state(norm)
    return run_case(norm, case, slice(None), torch.float64)


@pytest.mark.parametrize('name', CASES)
@in_turn(kept=['coded', 'exact'])
def test_as_one_process(name, kept, device):
    case = CASES[name]
    results = [r[kept][name] for r in in_two_processes(device.type)]
    expected = in_one_process(case)
    half = 'dtype' in case
    exact = kept == 'exact'
    for key in ('outputs', 'inputs'):
        for step in range(2):
            parts = [r[key][step] for r in results]
            if expected[key][step] is None:
                assert parts == [None, None]
                continue
            # Torch's own layer gives a part of no samples no gradient.
            empty = make_data(case)[0][0][:0]
            parts = [empty if p is None else p for p in parts]
            assert [len(p) for p in parts] == list(case['samples'])
            assert {p.dtype for p in parts} == {make_data(case)[0][0].dtype}
            # Only gradients in training mode see the codes of 8 bits.
            sees_codes = key == 'inputs' and name != 'eval' and not exact
            limit = 0.015 if half or sees_codes else FLOAT32_ERROR
            error = torch.cat(parts).double() - expected[key][step]
            # With two values a channel the input's gradient all but vanishes:
            # to be compared with the output's.
            assert error.norm() < limit * make_data(case)[step][1].norm()
    for key in expected.keys() & {'running_mean', 'running_var'}:
        for result in results:
            assert relative_error(result[key], expected[key]) < FLOAT32_ERROR
        assert_same_bits(results[0][key], results[1][key])
    if 'num_batches_tracked' in expected:
        for result in results:
            key = 'num_batches_tracked'
            assert result[key] == expected[key]
    for key in expected.keys() & {'weight', 'bias'}:
        # Each process has its share, the optimiser's all-reduce adds up.
        parts = [r[key] for r in results]
        if expected[key] is None:
            assert parts == [None, None]
            continue
        if exact and device.type == 'cuda':
            # Torch's own layer has no gradient where there are no samples.
            none = torch.zeros_like(expected[key])
            parts = [
                none if part is None and not samples else part
                for part, samples in zip(parts, case['samples'])
            ]
        total = sum(p.double() for p in parts)
        sees_codes = key == 'weight' and not exact
        limit = 0.02 if half or sees_codes else FLOAT32_ERROR
        assert relative_error(total, expected[key]) < limit
        assert not torch.equal(*parts)
        for part, samples in zip(parts, case['samples']):
            assert samples or not part.any()


def test_both_end_with_the_same_model(device):
    first, second = (r['trained'] for r in in_two_processes(device.type))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.isfinite().all()
        assert_same_bits(tensor, second[name])


def test_no_samples_on_any(device):
    norm = nn.SyncBatchNorm(CHANNELS)
    set_state(norm)
    for result in in_two_processes(device.type):
        found = result['no samples']
        for name in ('running_mean', 'running_var'):
            assert_same_bits(found[name], getattr(norm, name))
        assert not found['grad'].any()


def test_statistics_without_grad(device):
    for result in in_two_processes(device.type):
        torch.testing.assert_close(
            result['without grad'], torch.full((CHANNELS,), 0.5)
        )


@pytest.mark.parametrize(
    ('implementation', 'module'),
    [('torch', 'torch.nn.modules.batchnorm'), ('mmcv', 'mmcv.ops.sync_bn')],
)
def test_from_mmengine(implementation, module, device):
    for result in in_two_processes(device.type):
        found = result['mmengine'][implementation]
        assert found['names'] == [module, 'QSyncBatchNorm']
        # That of both processes: 0 in one, 1 in the other.
        torch.testing.assert_close(found['mean'], torch.full((CHANNELS,), 0.5))
        assert found['reverted'] and not found['left']


@pytest.mark.parametrize('level', ['L0', 'L3'])
def test_one_process_in_a_group(level, device):
    found, expected = start_one_process(device.type)['alone'][level]
    for key, value in found.items():
        if level == 'L0' or key in ('output', 'running_mean'):
            assert_same_bits(value, expected[key])


def test_collectives_of_one_process(device):
    found, expected = start_one_process(device.type)['collectives']
    assert found.keys() == expected.keys() and found
    for key, value in found.items():
        limit = 0.02 if key in ('input', 'weight') else FLOAT32_ERROR
        assert relative_error(value, expected[key]) < limit


@pytest.mark.parametrize('mode', ['default', 'N'])
def test_modes_of_mmcv(mode):
    text = start_one_process('cpu')['reports'][mode]
    if mode == 'default':
        assert 'SyncBatchNorm -> QSyncBatchNorm' in text
    else:
        assert "left: stats_mode is 'N', not the default" in text


@pytest.mark.parametrize('training', [True, False])
def test_one_process_without_a_group(training, device):
    norm = QSyncBatchNorm(CHANNELS, bits=8, device=device).train(training)
    set_state(norm)
    twin = nn.BatchNorm2d(CHANNELS, device=device).train(training)
    set_state(twin)
    x = torch.randn(3, CHANNELS, 5, 6, device=device)
    grad_output = torch.randn_like(x)
    expected = gradients(twin, x, grad_output)
    found = gradients(norm, x, grad_output)
    assert_same_bits(found['output'], expected['output'])
    assert_same_bits(norm.running_var, twin.running_var)
    assert relative_error(found['input'], expected['input']) < 5e-3
    assert relative_error(found['bias'], expected['bias']) < FLOAT32_ERROR


def test_class():
    norm = QSyncBatchNorm(CHANNELS)
    assert isinstance(norm, (nn.SyncBatchNorm, _BatchNorm))
    # MMEngine's init_cfg compares the names of direct bases.
    assert _BatchNorm in QSyncBatchNorm.__bases__
    assert list(norm.state_dict()) == list(
        nn.SyncBatchNorm(CHANNELS).state_dict()
    )


@in_turn(bits=[0, 9, 16])
def test_unknown_bits(bits):
    with pytest.raises(ValueError, match=f'bits.*got {bits}'):
        QSyncBatchNorm(CHANNELS, bits=bits)
