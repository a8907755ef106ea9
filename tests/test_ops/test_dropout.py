"""Dropout from a seed against its specification, and as statistics."""

import math

import pytest
import torch
from support.layers import assert_same_bits
from support.opcheck import opcheck
from support.pairs import in_turn

from mmactnn import ops
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (0, 4), (1,), (7,), (8,), (3, 5, 7, 11), (2, 16, 8, 8))


@in_turn(
    where=lambda shape, channels_last, **_: (
        len(shape) == 4 or not channels_last
    ),
    by='shape',
    shape=SHAPES,
    dtype=DTYPES,
    inplace=[False, True],
    channels_last=[False, True],
)
def test_specification(shape, dtype, inplace, channels_last, device):
    x = torch.randn(shape, device=device).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected = reference.dropout(x.cpu(), 0.3, seed=-7, offset=3)
    drop = ops.dropout_ if inplace else ops.dropout
    output = drop(x, 0.3, seed=-7, offset=3)
    assert (output is x) == inplace
    assert output.stride() == x.stride()
    assert_same_bits(output.cpu(), expected)


def test_pointers_off_the_vector_boundary(device):
    base = torch.randn(67, device=device).half()
    for start in range(4):
        x = base[start:]
        expected = reference.dropout(x.cpu(), 0.5, seed=1)
        assert_same_bits(ops.dropout(x, 0.5, seed=1).cpu(), expected)


@pytest.mark.parametrize('p', [0.01, 0.3, 0.5, 0.9, 0.999])
def test_rate_and_mean(p, device):
    n = 1 << 20
    output = ops.dropout(torch.ones(n, device=device), p, seed=11)
    dropped = float((output == 0).double().mean())
    error = math.sqrt(p * (1 - p) / n)
    assert abs(dropped - p) < 4 * error + 2**-17
    mean = float(output.double().mean())
    assert abs(mean - 1) < 4 * error / (1 - p)


def test_neighbours_are_independent(device):
    n = 1 << 20
    keep = ops.dropout(torch.ones(n, device=device), 0.5, seed=3) > 0
    for distance in (1, 2, 7, 8, 9):
        both = (keep[distance:] & keep[:-distance]).double().mean()
        assert abs(float(both) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


def test_seeds_and_offsets_differ(device):
    x = torch.ones(1024, device=device)
    first = ops.dropout(x, 0.5, seed=1)
    assert torch.equal(ops.dropout(x, 0.5, seed=1), first)
    for other in (dict(seed=2), dict(seed=1, offset=1)):
        same = (ops.dropout(x, 0.5, **other) == first).double().mean()
        assert 0.4 < float(same) < 0.6


def test_extreme_probabilities(device):
    x = torch.randn(1 << 16, device=device)
    assert torch.equal(ops.dropout(x, 0.0, seed=1), x)
    assert torch.equal(ops.dropout(x, 1e-9, seed=1), x)
    output = ops.dropout(torch.ones_like(x), 1 - 1e-9, seed=1)
    assert set(output.unique().tolist()) <= {0.0, 65536.0}


def test_dropped_nan_and_inf(device):
    x = torch.tensor([math.nan, math.inf], device=device).repeat(512)
    output = ops.dropout(x, 0.5, seed=1)
    kept = ops.dropout(torch.ones_like(x), 0.5, seed=1) > 0
    # As torch, which multiplies by 0.
    assert torch.equal(output.isinf(), kept & x.isinf())
    assert output[~output.isinf()].isnan().all()


@pytest.mark.parametrize('p', [-0.1, 1.0, math.nan])
def test_probability_that_is_none(p, device):
    with pytest.raises(RuntimeError, match='p must be in'):
        ops.dropout(torch.ones(3, device=device), p, seed=1)


def test_opcheck(device):
    x = torch.randn(3, 5, 7, device=device)
    arguments = (x, 0.5, 1, 2)
    opcheck(torch.ops.mmactnn.dropout.default, arguments)
    opcheck(torch.ops.mmactnn.dropout_.default, arguments)


def test_gaps_in_memory_are_refused_in_place(device):
    x = torch.randn(4, 8, device=device)[:, ::2]
    with pytest.raises(RuntimeError, match='dense in memory'):
        ops.dropout_(x, 0.5, seed=1)


def test_unknown_dtype(device):
    x = torch.zeros(3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match='float64'):
        ops.dropout(x, 0.5, seed=1)
