"""Batch normalisation with statistics of a few values."""

import pytest
import torch
from support.layers import assert_same_bits, gradients, relative_error
from torch import nn

from mmactnn import QBatchNorm2d, convert_model


def both(count):
    torch.manual_seed(0)
    x = 0.05 * torch.randn(count, 64, 1, 1)
    grad_output = torch.randn_like(x)
    return (
        gradients(QBatchNorm2d(64, bits=2), x, grad_output),
        gradients(nn.BatchNorm2d(64), x, grad_output),
    )


@pytest.mark.parametrize('count', [2, 4, 15])
def test_exact(count):
    found, expected = both(count)
    for key, value in expected.items():
        assert_same_bits(found[key], value)


@pytest.mark.parametrize('count', [16, 64])
def test_codes(count):
    found, expected = both(count)
    assert 0 < relative_error(found['input'], expected['input']) < 0.5


def test_fused():
    """Squeezed maps of a batch of two, as in ResNeSt's attention."""
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)
    )
    x = 0.05 * torch.randn(2, 8, 1, 1)
    grad_output = torch.randn(2, 8, 1, 1)
    expected = gradients(block, x, grad_output)['input']
    block.zero_grad()
    convert_model(block, 'L3')
    found = gradients(block, x, grad_output)['input']
    assert relative_error(found, expected) < 1e-3
