"""Compressed training learns as well as exact training, on real digits."""

from support.digits_net import accuracy

SEEDS = (0, 1, 2)


def test_three_seeds():
    found = {
        level: [accuracy(level, seed) for seed in SEEDS]
        for level in ('L0', 'L3')
    }
    means = {level: sum(v) / len(v) for level, v in found.items()}
    assert means['L0'] > 95, found
    assert abs(means['L0'] - means['L3']) <= 1, found
