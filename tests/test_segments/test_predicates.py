"""Predicates of segments come from the first pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmactnn


def gradient(run, function, x, dtype=torch.float32):
    leaf = x.clone().requires_grad_()
    output = run(function, (leaf * 1).to(dtype))
    output.float().sum().backward()
    return leaf.grad


def plainly(function, x):
    return function(x)


# Close to jumps, so that decoded values are often on the other side.
X = (
    0.02 * torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    + torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 6.0]).repeat(43)[:256]
)

FUNCTIONS = {
    'relu': F.relu,
    'module': nn.ReLU(),
    'in place': lambda x: F.relu(x + 0, inplace=True),
    'method in place': lambda x: (x + 0).relu_(),
    'leaky': lambda x: F.leaky_relu(x, 0.1),
    'relu6': nn.ReLU6(),
    'relu6 in place': lambda x: nn.ReLU6(inplace=True)(x + 0),
    'hardtanh': nn.Hardtanh(),
    'clamp': lambda x: x.clamp(min=-1, max=3),
    'clamp_min': lambda x: torch.clamp_min(x, 0.0),
    'abs': torch.abs,
    'comparison': lambda x: torch.where(x > 1, 2 * x, -x),
    'sign by index': lambda x: x * x.gt(0).to(x.dtype),
    'control flow': lambda x: 2 * x if (x[0, 2] > 0).item() else -x,
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_piecewise_linear_functions_are_exact(name, dtype):
    """Their gradient depends on the side of each element alone."""
    function = FUNCTIONS[name]
    expected = gradient(plainly, function, X, dtype)
    for bits in (8, 2):

        def run(function, x, bits=bits):
            return mmactnn.checkpoint(function, x, bits=bits)

        assert torch.equal(gradient(run, function, X, dtype), expected)


def test_values_stay_close():
    """Arguments of one sign are not moved."""
    x = X.abs() + 4

    def function(x):
        return F.relu(x).square()

    grad = gradient(mmactnn.checkpoint, function, x)
    torch.testing.assert_close(grad, 2 * x, atol=0.05, rtol=0)
    assert not torch.equal(grad, 2 * x)


def test_bounds_that_equal_true_are_not_in_place():
    """``hardtanh(x, -1, 1)`` leaves x alone."""

    def function(x):
        return F.hardtanh(x, -1.0, 1.0) * 0 + x.square()

    grad = gradient(mmactnn.checkpoint, function, 10 + X)
    torch.testing.assert_close(grad, 2 * (10 + X), atol=0.1, rtol=0)


def test_other_functions_again():
    calls = []

    def function(x):
        calls.append(None)
        return F.relu(x) if len(calls) == 1 else x.abs()

    with pytest.raises(RuntimeError, match='other functions again'):
        gradient(mmactnn.checkpoint, function, X)


def test_float64_in_the_function():
    expected = gradient(plainly, lambda x: F.relu(x.double()).float(), X)
    grad = gradient(
        mmactnn.checkpoint, lambda x: F.relu(x.double()).float(), X
    )
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    'make',
    [
        lambda: nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 8, 3, padding=1, bias=False),
        ),
        lambda: nn.Sequential(
            nn.LayerNorm(16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)
        ),
    ],
    ids=['convolutions', 'feed-forward'],
)
def test_bias_of_blocks_with_relu(make):
    """Mean of 32 draws: within a tenth of the error of one of the gradient."""
    torch.manual_seed(0)
    block, x = make(), torch.randn(8, 8, 16, 16)
    target = torch.randn(x.shape)

    def gradients(run):
        block.zero_grad()
        y = run(block, x.clone().requires_grad_() * 1)
        (y * target).sum().backward()
        return torch.cat([p.grad.flatten() for p in block.parameters()])

    exact = gradients(plainly)
    draws = torch.stack([gradients(mmactnn.checkpoint) for _ in range(32)])
    error = (draws - exact).norm(dim=1).square().mean().sqrt()
    mean = (draws.mean(0) - exact).norm()
    bias = ((mean**2 - error**2 / 32).clamp_min(0) * 32 / 31).sqrt()
    assert error < 0.02 * exact.norm()
    assert bias < 0.1 * error
