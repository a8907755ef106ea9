"""Functions with weights that a module computes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same_bits, relative_error
from torch import nn

from mmactnn import convert_model, measure_activations


class Dynamic(nn.Module):
    """Convolutions and products whose weights another layer computes."""

    def __init__(self, function, weight_size, bias_size=None):
        super().__init__()
        self.function = function
        self.weight_size = weight_size
        self.bias_size = bias_size
        self.before = nn.Conv2d(8, 8, 1)
        numel = math.prod(weight_size)
        self.make_weight = nn.Linear(4, numel)
        self.make_bias = bias_size and nn.Linear(4, bias_size)

    def forward(self, x):
        code = torch.linspace(-1, 1, 4, dtype=x.dtype, device=x.device)
        weight = self.make_weight(code).view(self.weight_size).tanh()
        bias = self.make_bias(code) if self.make_bias else None
        return self.function(self.before(x), weight, bias)


# Function, size of the weight, of the bias.
CASES = {
    'conv1d': (
        lambda x, w, b: F.conv1d(x.flatten(2), w, b, 2, (1,), dilation=3),
        (6, 8, 3),
        6,
    ),
    'conv2d': (lambda x, w, b: F.conv2d(x, w, b, (2, 1)), (6, 8, 3, 3), 6),
    'conv2d, groups': (
        lambda x, w, b: F.conv2d(
            x.reshape(1, 32, *x.shape[2:]), w, bias=b, groups=4
        ),
        (8, 8, 1, 1),
        8,
    ),
    'conv2d, same': (
        lambda x, w, b: F.conv2d(input=x, weight=w, padding='same'),
        (6, 8, 2, 3),
        None,
    ),
    'conv2d, valid': (
        lambda x, w, b: torch.conv2d(x, w, b, padding='valid'),
        (6, 8, 2, 3),
        6,
    ),
    'conv3d': (
        lambda x, w, b: F.conv3d(x.unflatten(1, (2, 4)), w, b, padding=1),
        (3, 2, 3, 3, 3),
        3,
    ),
    'conv_transpose1d': (
        lambda x, w, b: F.conv_transpose1d(x.flatten(2), w, b, 2, 1, 1),
        (8, 6, 3),
        6,
    ),
    'conv_transpose2d': (
        lambda x, w, b: F.conv_transpose2d(x, w, None, (2, 1), groups=2),
        (8, 3, 2, 2),
        None,
    ),
    'conv_transpose3d': (
        lambda x, w, b: F.conv_transpose3d(
            x.unflatten(1, (2, 4)), w, b, dilation=(1, 2, 1)
        ),
        (2, 3, 2, 2, 2),
        3,
    ),
    'linear': (lambda x, w, b: F.linear(x.mT, w, b), (5, 12), 5),
}


def run(module, x):
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    output = module(leaf)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape).to(output))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return output.detach(), dict(grads, input=leaf.grad)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', CASES)
def test_outputs_and_gradients(device, name, dtype):
    torch.manual_seed(0)
    module = Dynamic(*CASES[name]).to(device, dtype)
    twin = copy.deepcopy(module)
    convert_model(module, dict(base='L2', conv=8, act=8))
    x = torch.randn(4, 8, 12, 10, device=device, dtype=dtype)
    ours, stock = run(module, x), run(twin, x)
    assert_same_bits(ours[0], stock[0])
    for key, expected in stock[1].items():
        assert relative_error(ours[1][key], expected) < 0.03
    # That of the input does not depend on codes.
    low = torch.finfo(dtype).eps
    assert relative_error(ours[1]['input'], stock[1]['input']) < 8 * low


@pytest.mark.parametrize('name', CASES)
def test_keeps_less(name):
    module = Dynamic(*CASES[name])
    twin = copy.deepcopy(module)
    convert_model(module, 'L2')
    kept = []
    for each in (module, twin):
        with measure_activations(each) as meter:
            each(torch.randn(4, 8, 12, 128))
        kept.append(meter)
    ours, stock = kept
    assert ours.exact_bytes == stock.saved_bytes
    # Codes of both inputs, and few weights.
    assert ours.saved_bytes < stock.saved_bytes / 4


@pytest.mark.parametrize('name', ['conv2d, groups', 'linear'])
def test_unbiased(name):
    torch.manual_seed(0)
    module = Dynamic(*CASES[name])
    exact = copy.deepcopy(module).double()
    convert_model(module, dict(base='L2', conv=2))
    x = torch.randn(4, 8, 12, 10)
    key = 'make_weight.weight'
    expected = run(exact, x.double())[1][key]
    draws = 40
    found = torch.stack([run(module, x)[1][key] for _ in range(draws)])
    errors = (found.double() - expected).flatten(1).norm(dim=1)
    bias = (found.double().mean(0) - expected).norm()
    assert errors.mean() > 0.01 * expected.norm()
    assert bias < 1.4 * errors.mean() / math.sqrt(draws)


class Switched(nn.Conv2d):
    """Two convolutions with its parent's function and weights of its own."""

    def forward(self, x):
        x = x + x.mean((2, 3), keepdim=True)
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        first = self._conv_forward(x, weight, self.bias)
        return first + self._conv_forward(x, 2 * weight, None)


class TestParentsFunction:
    def test_of_a_subclass(self):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(4, 4, 1), Switched(4, 4, 3))
        twin = copy.deepcopy(module)
        convert_model(module, dict(base='L2', conv=8))
        x = torch.randn(2, 4, 16, 16, requires_grad=True)
        with measure_activations(module) as meter:
            output = module(x)
        # The input of either layer, for the two convolutions share a payload,
        # and two weights that are computed.
        weights = 2 * 4 * module[1].weight.numel()
        assert meter.saved_bytes == 2 * x.numel() * (1 + 4 / 256) + weights
        assert_same_bits(output, twin(x))
        for each in (module, twin):
            each(x).square().sum().backward()
        assert (
            relative_error(module[1].weight.grad, twin[1].weight.grad) < 0.03
        )

    def test_of_a_layer_left_exact(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(4, 4, 1)
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                return self.conv(self.fc(x))

        module = nn.Sequential(Both())
        convert_model(module, 'L2', exclude=['*conv'])
        output = module(torch.randn(1, 4, 5, 4, requires_grad=True))
        assert output.grad_fn.name() == 'ConvolutionBackward0'


def test_left_to_torch():
    """Single samples, and what torch refuses with errors of its own."""
    module = Dynamic(lambda x, w, b: F.conv2d(x[0], w), (6, 8, 3, 3))
    convert_model(module, 'L2')
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    output = module(x)
    assert output.grad_fn.name() == 'SqueezeBackward1'
    for function, error in (
        (lambda x, w, b: F.conv2d(x, w, stride=2, padding='same'), 'strided'),
        (lambda x, w, b: F.conv2d(x, w, padding='some'), 'padding'),
        (lambda x, w, b: F.conv2d(x.double(), w), 'type'),
        (lambda x, w, b: F.conv2d(x[:, :5], w), 'channels'),
    ):
        module.function = function
        with pytest.raises(RuntimeError, match=error):
            module(x)
