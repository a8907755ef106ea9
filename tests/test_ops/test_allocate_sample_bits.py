"""Allocation of bits against a heap, brute force and the specification."""

import heapq
import itertools
import math

import numpy as np
import pytest
import torch
from support.opcheck import opcheck
from support.pairs import in_turn

from mmactnn import ops
from mmactnn.ops import reference


def split_by_heap(sensitivity, total_bits):
    """One bit after the other, in float32."""
    factors = [1 / (2**bits - 1) ** 2 for bits in range(1, 9)]
    unit = [np.float32(a - b) for a, b in zip(factors, factors[1:])]
    weights = sensitivity.numpy()
    heap = [(-weight * unit[0], 1, n) for n, weight in enumerate(weights)]
    heapq.heapify(heap)
    bits = [1] * len(weights)
    for _ in range(total_bits - len(weights)):
        _, width, n = heapq.heappop(heap)
        bits[n] = width + 1
        if width < 7:
            heapq.heappush(heap, (-weights[n] * unit[width], width + 1, n))
    return bits


def variance(sensitivity, bits):
    return sum(c / (2**b - 1) ** 2 for c, b in zip(sensitivity.tolist(), bits))


def check(sensitivity, total_bits, device):
    row_bits, row_starts = ops.allocate_sample_bits(
        sensitivity.to(device), total_bits
    )
    assert row_bits.dtype == torch.uint8
    assert row_starts.dtype == torch.int32
    expected = reference.allocate_sample_bits(sensitivity, total_bits)
    assert torch.equal(row_bits.cpu(), expected[0])
    assert torch.equal(row_starts.cpu(), expected[1])
    bits = row_bits.tolist()
    assert sum(bits) == total_bits
    assert all(1 <= b <= 8 for b in bits)
    starts = [0, *itertools.accumulate(bits)][: len(bits)]
    assert row_starts.tolist() == starts
    return bits


@in_turn(rows=[1, 2, 7, 64, 255, 256, 257, 1000], spread=[0.1, 3, 30])
def test_equals_heap(rows, spread, device):
    generator = torch.Generator().manual_seed(rows)
    sensitivity = torch.exp(spread * torch.randn(rows, generator=generator))
    for total in {rows, rows + 1, 2 * rows, 5 * rows // 2, 8 * rows - 1}:
        bits = check(sensitivity, total, device)
        assert bits == split_by_heap(sensitivity, total)
    assert check(sensitivity, 8 * rows, device) == [8] * rows


def test_is_the_minimum(device):
    rows = 4
    choices = list(itertools.product(range(1, 9), repeat=rows))
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        sensitivity = torch.rand(rows, generator=generator) ** 4
        for total in (4, 7, 12, 21, 30):
            least = min(
                variance(sensitivity, bits)
                for bits in choices
                if sum(bits) == total
            )
            bits = check(sensitivity, total, device)
            cost = variance(sensitivity, bits)
            assert cost == pytest.approx(least, rel=1e-6)


@in_turn(value=[0.0, 1.0, 1e-45, 3.4e38, math.inf])
def test_equal_rows_share_evenly_the_first_more(value, device):
    rows = 300
    sensitivity = torch.full((rows,), value)
    for total in (301, 750, 1000, 2399):
        bits = check(sensitivity, total, device)
        fewest, more = divmod(total, rows)
        assert bits == [fewest + 1] * more + [fewest] * (rows - more)


def test_ties_among_other_rows(device):
    generator = torch.Generator().manual_seed(0)
    sensitivity = torch.randint(0, 4, (700,), generator=generator).float()
    sensitivity[::5] *= 1e-44  # gains that are subnormal or 0
    for total in range(700, 5601, 350):
        bits = check(sensitivity, total, device)
        assert bits == split_by_heap(sensitivity, total)


def test_numbers_that_are_none(device):
    inf, nan = math.inf, math.nan
    largest = torch.finfo(torch.float32).max
    odd = torch.tensor([nan, inf, -inf, -3.0, -0.0, 1.0, largest, -nan])
    plain = torch.tensor(
        [largest, largest, 0.0, 0.0, 0.0, 1.0, largest, largest]
    )
    for total in (8, 13, 20, 41, 45, 50, 60):
        assert check(odd, total, device) == check(plain, total, device)


def test_no_rows(device):
    row_bits, row_starts = ops.allocate_sample_bits(
        torch.zeros(0, device=device), 0
    )
    assert row_bits.shape == row_starts.shape == (0,)


def test_not_contiguous(device):
    base = torch.rand(20, 2, device=device)
    assert torch.equal(
        ops.allocate_sample_bits(base[:, 1], 50)[0],
        ops.allocate_sample_bits(base[:, 1].contiguous(), 50)[0],
    )


def test_opcheck(device):
    opcheck(
        torch.ops.mmactnn.allocate_sample_bits.default,
        (torch.rand(9, device=device), 20),
    )


@in_turn(total_bits=[0, 2, 25, 10.0])
def test_unknown_total_bits(total_bits, device):
    with pytest.raises(ValueError, match=f'3 to 24 .* got {total_bits}'):
        ops.allocate_sample_bits(torch.rand(3, device=device), total_bits)


def test_unknown_sensitivity(device):
    with pytest.raises(TypeError, match='float32, got torch.float64'):
        ops.allocate_sample_bits(torch.rand(3, device=device).double(), 9)
    with pytest.raises(ValueError, match=r'one dimension, got \(3, 1\)'):
        ops.allocate_sample_bits(torch.rand(3, 1, device=device), 9)
