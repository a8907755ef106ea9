"""Accuracy after a real training, short as it is."""

import torch
from support.small_resnet import train_and_test

SEEDS, EPOCHS = range(2), 2


def test_handwritten_digits():
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    found, means = {}, {}
    for level in ('L0', 'L3'):
        found[level] = [
            train_and_test(level, seed, EPOCHS, device=device)
            for seed in SEEDS
        ]
        means[level] = sum(found[level]) / len(found[level])
    message = '; '.join(
        f'{level}: {means[level]:.2f} % of '
        + ', '.join(f'{value:.2f}' for value in values)
        for level, values in found.items()
    )
    assert means['L0'] > 95, message
    assert abs(means['L0'] - means['L3']) <= 1, message
    # Rounding has taken place.
    assert found['L0'] != found['L3'], message
