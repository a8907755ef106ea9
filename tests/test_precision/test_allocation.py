"""The greedy allocation against all others."""

import itertools
import random

import pytest
import torch

from mmactnn import ops
from mmactnn.precision.allocation import allocate_bits
from mmactnn.precision.variance import (
    relative_variance,
    variance_of_normal_values,
)


def variance(costs, bits, rotated=False):
    return sum(
        cost * relative_variance(b, rotated) for cost, b in zip(costs, bits)
    )


class TestRelativeVariance:
    @pytest.mark.parametrize('rotated', [False, True])
    def test_is_convex(self, rotated):
        values = [relative_variance(bits, rotated) for bits in range(1, 9)]
        assert values[0] == 1
        gains = [now - then for now, then in zip(values, values[1:])]
        assert gains == sorted(gains, reverse=True) and gains[-1] > 0

    def test_of_ranges(self):
        assert relative_variance(2.5, False) == 1 / (2**2.5 - 1) ** 2

    def test_of_means_lies_between(self):
        for bits in range(1, 8):
            here, half, there = (
                relative_variance(bits + part, True) for part in (0, 0.5, 1)
            )
            assert half == pytest.approx((here * there) ** 0.5)

    def test_of_normal_values(self):
        """As the kernels have it."""
        x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
        layout = x.shape, x.stride(), x.dtype
        for bits in range(1, 7):
            codes = ops.quantize(x, bits, seed=3, rotated=True)
            drawn = ops.DrawnBits.of('rotated', 3, 0)
            error = ops.dequantize(*codes, *layout, bits, drawn=drawn) - x
            expected = variance_of_normal_values(bits)
            found = float(error.square().mean())
            # Coefficients of a group have no longer tails than its energy
            # allows: a little less. Steps of ranges are rounded up.
            assert 0.97 < found / expected < 1.02, bits


class TestAllocateBits:
    @pytest.mark.parametrize('rotated', [False, True])
    @pytest.mark.parametrize('seed', range(5))
    def test_is_optimal_for_equal_sizes(self, seed, rotated):
        draw = random.Random(seed)
        costs = [draw.lognormvariate(0, 3) for _ in range(4)]
        for budget in range(4, 4 * 8 + 1, 3):
            bits = allocate_bits(costs, [1] * 4, budget, rotated)
            assert sum(bits) <= budget
            best = min(
                variance(costs, other, rotated)
                for other in itertools.product(range(1, 9), repeat=4)
                if sum(other) <= budget
            )
            assert variance(costs, bits, rotated) == pytest.approx(best)

    @pytest.mark.parametrize('seed', range(5))
    def test_is_near_the_optimum_for_other_sizes(self, seed):
        draw = random.Random(seed)
        costs = [draw.lognormvariate(0, 2) for _ in range(4)]
        sizes = [draw.randint(1, 9) for _ in range(4)]
        budget = 3 * sum(sizes)
        bits = allocate_bits(costs, sizes, budget)
        used = sum(b * s for b, s in zip(bits, sizes))
        assert used <= budget
        # Nothing better fits into what it really uses.
        best = min(
            variance(costs, other)
            for other in itertools.product(range(1, 9), repeat=4)
            if sum(b * s for b, s in zip(other, sizes)) <= used
        )
        assert variance(costs, bits) <= best * 1.35

    def test_mean_bits_for_equal_costs(self):
        assert allocate_bits([1.0] * 5, [7] * 5, 2 * 35) == [2] * 5

    def test_what_costs_nothing_gets_the_fewest(self):
        assert allocate_bits([0.0, 1.0], [10, 10], 60) == [1, 5]

    def test_no_more_than_eight(self):
        assert allocate_bits([5.0, 1.0], [1, 1], 100) == [8, 8]

    def test_too_small_a_budget(self):
        assert allocate_bits([5.0, 1.0], [4, 4], 2) == [1, 1]

    def test_no_tensors(self):
        assert allocate_bits([], [], 0) == []
