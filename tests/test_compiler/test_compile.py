"""Compiled graphs that keep codes: gradients, memory and options."""

import pytest
import torch
import torch.nn.functional as F
from support.transformer import Block, relative
from torch import nn

import mmactnn


class Mlp(nn.Sequential):
    """A rectifier, a gate-like activation and a layer of either."""

    def __init__(self):
        super().__init__(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.SiLU()
        )


class Cnn(nn.Module):
    """Residual block behind a stem with pooling."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Windows(nn.Module):
    """Attention within shifted windows, by separate calls."""

    def __init__(self, width=64, heads=4, window=16):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, window, window))

    def forward(self, x):
        n, t, c = x.shape
        y = torch.roll(self.norm(x), 3, 1).view(-1, self.window, c)
        y = self.qkv(y).view(len(y), self.window, 3, self.heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + self.bias
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c)
        return x + torch.roll(self.proj(y), -3, 1)


def make(name):
    """Model and input, the same in every call."""
    torch.manual_seed(0)
    mmactnn.manual_seed(0)
    if name == 'mlp':
        return Mlp(), torch.randn(256, 64)
    if name == 'cnn':
        return Cnn(), torch.randn(8, 3, 32, 32)
    if name == 'vit':
        return Block(), torch.randn(4, 64, 64)
    return Windows(), torch.randn(4, 64, 64)


def gradient(model, function, *inputs):
    """Loss and gradient of all parameters."""
    model.zero_grad()
    loss = function(*inputs).float().square().mean()
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters()]
    return loss.detach(), torch.cat(grads).clone()


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Least factor of memory, and largest error of one draw.
@pytest.mark.parametrize(
    'name, ratio, error',
    [('mlp', 9, 0.1), ('cnn', 9, 0.05), ('vit', 9, 0.35), ('win', 7, 0.5)],
)
def test_gradients_are_unbiased(name, ratio, error):
    """The loss is exact; the mean of draws tends to the gradient."""
    model, x = make(name)
    exact = torch.compile(model, backend='aot_eager_decomp_partition')
    loss, expected = gradient(model, exact, x)
    compiled = mmactnn.compile(model, backend='aot_eager')
    draws = []
    for _ in range(16):
        found, grad = gradient(model, compiled, x)
        assert found == loss
        draws.append(grad)
    single = sum(relative(grad, expected) for grad in draws) / len(draws)
    assert 0.002 < single < error
    assert len({float(grad.sum()) for grad in draws}) == len(draws)
    mean = relative(sum(draws) / len(draws), expected)
    assert mean * len(draws) ** 0.5 < 1.3 * single
    kept = mmactnn.compile_report(compiled).graphs[0].kept
    before = sum(item.exact_nbytes for item in kept)
    assert before > ratio * sum(item.nbytes for item in kept)
