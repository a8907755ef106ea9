"""The greedy allocation against all others."""

import itertools
import random

import pytest

from mmactnn.precision.allocation import allocate_bits


def variance(costs, bits):
    return sum(c / (2**b - 1) ** 2 for c, b in zip(costs, bits))


class TestAllocateBits:
    @pytest.mark.parametrize('seed', range(5))
    def test_is_optimal_for_equal_sizes(self, seed):
        draw = random.Random(seed)
        costs = [draw.lognormvariate(0, 3) for _ in range(4)]
        for budget in range(4, 4 * 8 + 1, 3):
            bits = allocate_bits(costs, [1] * 4, budget)
            assert sum(bits) <= budget
            best = min(
                variance(costs, other)
                for other in itertools.product(range(1, 9), repeat=4)
                if sum(other) <= budget
            )
            assert variance(costs, bits) == pytest.approx(best)

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
