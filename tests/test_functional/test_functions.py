"""Compressed functions against torch's."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same_bits, relative_error
from torch import nn

from mmactnn import (
    QMatrixProduct,
    QProduct,
    convert_model,
    measure_activations,
)
from mmactnn.registry import FunctionEntry, default_registry


class Calls(nn.Module):
    """A module that calls a function amid its graph."""

    def __init__(self, function, width=32):
        super().__init__()
        self.function = function
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.function(self, self.first(x), self.second(x))


# Functions of the module and two activations.
CASES = {
    'F.relu': lambda m, x, y: F.relu(x) + y,
    'torch.relu': lambda m, x, y: torch.relu(x) + y,
    'Tensor.relu': lambda m, x, y: x.relu() + y,
    'F.relu, in place': lambda m, x, y: F.relu(x, inplace=True) + y,
    'F.relu_': lambda m, x, y: F.relu_(x) + y,
    'Tensor.relu_': lambda m, x, y: x.relu_() + y,
    'F.relu6': lambda m, x, y: F.relu6(9 * x) + y,
    'F.leaky_relu': lambda m, x, y: F.leaky_relu(x, 0.2) + y,
    'F.leaky_relu, keyword': lambda m, x, y: (
        F.leaky_relu(x, negative_slope=0.3, inplace=True) + y
    ),
    'F.silu': lambda m, x, y: F.silu(x) + y,
    'F.layer_norm': lambda m, x, y: (
        F.layer_norm(x, (32,), m.scale, None, 1e-4) + y
    ),
    'F.layer_norm, plain': lambda m, x, y: F.layer_norm(x, [32]) + y,
    'F.rms_norm': lambda m, x, y: F.rms_norm(x, (32,), m.scale, 1e-4) + y,
    'torch.rms_norm': lambda m, x, y: torch.rms_norm(x, (32,)) + y,
    'F.group_norm': lambda m, x, y: F.group_norm(x, 1, eps=1e-3) + y,
    'F.linear': lambda m, x, y: F.linear(x, m.second.weight) + y,
    'F.linear, keywords': lambda m, x, y: (
        F.linear(input=x, weight=m.second.weight) + y
    ),
    'product': lambda m, x, y: x * y,
    'torch.mul': lambda m, x, y: torch.mul(x, y),
    'Tensor.mul': lambda m, x, y: x.mul(y),
    'square': lambda m, x, y: x * x + y,
    'a power': lambda m, x, y: x**2 + y,
    'Tensor.pow': lambda m, x, y: x.pow(2) + y,
    'torch.square': lambda m, x, y: torch.square(x) + y,
    'a broadcast difference': lambda m, x, y: (
        (x - y.mean(1, keepdim=True)).pow(2.0) + y
    ),
    'scale': lambda m, x, y: x * m.scale + y,
    'gate': lambda m, x, y: x * y.mean(1, keepdim=True) + y,
    'SwiGLU': lambda m, x, y: F.silu(x) * y,
    'F.avg_pool2d': lambda m, x, y: F.avg_pool2d(x, 3, 1, 1) + y,
    'F.avg_pool2d, keywords': lambda m, x, y: (
        F.avg_pool2d(x, (1, 3), stride=1, padding=(0, 1), ceil_mode=True) + y
    ),
    'F.adaptive_avg_pool2d': lambda m, x, y: (
        F.adaptive_avg_pool2d(x, (None, 8)).repeat(1, 1, 4) + y
    ),
    'torch.matmul': lambda m, x, y: torch.matmul(x, y.mT) @ y,
    'torch.bmm': lambda m, x, y: x.bmm(torch.bmm(y.mT, x)),
    'torch.einsum': lambda m, x, y: torch.einsum('blc, bkc -> bkl', x, y) @ y,
    'F.max_pool2d': lambda m, x, y: F.max_pool2d(x, 3, 1, 1) + y,
}
# Here some factors are kept themselves.
EXACT_FACTORS = {
    'softmax of rows': lambda m, x, y: (x @ y.mT).softmax(-2) @ y,
    'one right factor': lambda m, x, y: (
        x @ y.flatten(0, 1).mT @ y.flatten(0, 1)
    ),
    'one left factor': lambda m, x, y: x[0] @ y.mT @ y,
}


def run(module, x, grad_output):
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    output = module(leaf)
    output.backward(grad_output)
    grads = {name: p.grad for name, p in module.named_parameters()}
    return output.detach(), dict(grads, input=leaf.grad)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', [*CASES, *EXACT_FACTORS])
def test_outputs_and_gradients(device, name, dtype):
    torch.manual_seed(0)
    module = Calls((CASES | EXACT_FACTORS)[name]).to(device, dtype)
    twin = copy.deepcopy(module)
    convert_model(module, dict(base='L2', conv=8, norm=7, act=8))
    x = torch.randn(4, 3, 32, device=device, dtype=dtype)
    grad_output = torch.randn(4, 3, 32, device=device, dtype=dtype)
    ours = run(module, x, grad_output)
    stock = run(twin, x, grad_output)
    assert_same_bits(ours[0], stock[0])
    for key, expected in stock[1].items():
        if expected is None:
            assert ours[1][key] is None
            continue
        assert ours[1][key].dtype == expected.dtype
        assert relative_error(ours[1][key], expected) < 0.03


@pytest.mark.parametrize('name', CASES)
def test_keeps_less(name):
    module = Calls(CASES[name])
    twin = copy.deepcopy(module)
    convert_model(module, 'L2')
    x = torch.randn(8, 64, 32, requires_grad=True)
    kept = []
    for each in (module, twin):
        with measure_activations(each) as meter:
            each(x)
        kept.append(meter)
    ours, stock = kept
    assert ours.exact_bytes == stock.saved_bytes
    # The input and what the function keeps, at 5 bits and less an element.
    assert ours.saved_bytes < stock.saved_bytes / 4


@pytest.mark.parametrize(
    'name', ['product', 'square', 'scale', 'SwiGLU', 'torch.bmm']
)
def test_unbiased(name):
    torch.manual_seed(0)
    module = Calls(CASES[name])
    exact = copy.deepcopy(module).double()
    convert_model(module, dict(base='L2', act=2, conv=2))
    x, grad_output = torch.randn(2, 4, 16, 32)
    _, expected = run(exact, x.double(), grad_output.double())
    draws = 40
    found = [run(module, x, grad_output)[1] for _ in range(draws)]
    for key, value in expected.items():
        if value is None:
            continue
        values = torch.stack([each[key] for each in found]).double()
        single = (values - value).flatten(1).norm(dim=1).mean()
        mean = (values.mean(0) - value).norm()
        # Biases and others are exact but for float32.
        assert mean < 1.4 * single / math.sqrt(draws) + 1e-5 * value.norm()


def test_pool_of_an_exact_layer():
    """A layer that filters leave exact keeps torch's function."""
    module = Calls(lambda m, x, y: m.pool(x) + y)
    module.pool = nn.MaxPool2d(3, 1, 1)
    convert_model(module, 'L2', exclude=['pool'])
    output = module(torch.randn(1, 2, 4, 32, requires_grad=True))
    before = output.grad_fn.next_functions[0][0]
    assert before.name() == 'MaxPool2DWithIndicesBackward0'


def test_dropout():
    module = Calls(lambda m, x, y: F.dropout(x, 0.25, m.training) + 0 * y)
    convert_model(module, 'L2')
    x = torch.randn(64, 8, 32, requires_grad=True)
    with measure_activations(module) as meter:
        output = module(x)
    assert 0.2 < float((output == 0).float().mean()) < 0.3
    # Codes of the input, for either layer, and nothing of the function.
    assert meter.saved_bytes == 2 * x.numel() * (4 / 8 + 4 / 256)
    first = module.first(x)
    kept = output != 0
    torch.testing.assert_close(output[kept], first[kept] / 0.75)
    module.eval()
    assert_same_bits(module(x), first)


def test_dropout2d():
    module = Calls(lambda m, x, y: F.dropout2d(x, 0.5) + 0 * y)
    convert_model(module, 'L2')
    output = module(torch.randn(8, 16, 3, 32, requires_grad=True))
    dropped = (output == 0).flatten(2).all(2)
    assert_same_bits(dropped, (output == 0).flatten(2).any(2))
    assert 0.3 < float(dropped.float().mean()) < 0.7


class TestProducts:
    @pytest.mark.parametrize(
        'function',
        [
            lambda m, x, y: x * 2 + y,
            lambda m, x, y: x * torch.ones(32) + y,
            lambda m, x, y: x * y.detach(),
            lambda m, x, y: x.sum() * y.sum(),
            lambda m, x, y: x.double() * y.double(),
            lambda m, x, y: m.scale * m.scale * x[0, 0, 0].detach(),
        ],
    )
    def test_left_to_torch(self, function):
        module = Calls(function)
        convert_model(module, 'L2')
        output = module(torch.randn(2, 3, 32, requires_grad=True))
        todo, names = [output.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is not None:
                names.add(node.name())
                todo += [before for before, _ in node.next_functions]
        assert '_ProductBackward' not in names

    def test_loss_without_parameters(self):
        class Loss(nn.Module):
            def forward(self, x, y):
                return (x * y).sum()

        module = Calls(lambda m, x, y: m.loss(x, y))
        module.loss = Loss()
        convert_model(module, 'L2')
        x = torch.randn(2, 3, 32, requires_grad=True)
        assert module(x).grad_fn.next_functions[0][0].name() == 'MulBackward0'

    def test_result_of_softmax_is_kept_once(self):
        module = Calls(lambda m, x, y: x.softmax(-1) @ y.mT @ y)
        convert_model(module, 'L2')
        x = torch.randn(8, 32, 32, requires_grad=True)
        with measure_activations(module) as meter:
            module(x)
        codes = x.numel() * (4 / 8 + 4 / 256)
        # Of the input, for either layer, of both views of y, and of the first
        # product.
        assert meter.saved_bytes == 5 * codes + 4 * x.numel()

    def test_matrices_under_autocast(self):
        module = Calls(lambda m, x, y: x.float() @ y.float().mT @ y.float())
        twin = copy.deepcopy(module)
        convert_model(module, dict(base='L2', conv=8, act=8))
        x = torch.randn(4, 3, 32)
        found = []
        for each in (module, twin):
            with torch.autocast('cpu', torch.bfloat16):
                output = each(x)
            assert output.dtype == torch.bfloat16
            output.float().square().sum().backward()
            found.append((output, each.first.weight.grad))
        assert_same_bits(found[0][0], found[1][0])
        assert relative_error(found[0][1], found[1][1]) < 0.03

    def test_layer_of_matrices(self):
        layer = QMatrixProduct(bits=8)
        x = torch.randn(4, 8, 32, requires_grad=True)
        output = layer(x.cos(), x.sin().mT)
        assert output.grad_fn.name() == '_ProductBackward'
        (grad,) = torch.autograd.grad(output.square().sum(), x)
        exact = (x.cos() @ x.sin().mT).square().sum()
        (expected,) = torch.autograd.grad(exact, x)
        assert relative_error(grad, expected) < 0.03
        vector = layer(x.cos(), x[0, 0].sin())
        assert vector.grad_fn.name() != '_ProductBackward'

    def test_second_derivative(self):
        layer = QProduct(bits=4)
        x = torch.randn(4, 32, requires_grad=True)
        (grad,) = torch.autograd.grad(
            layer(x.exp(), x.sin()).sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError, match='product cannot be'):
            grad.sum().backward()

    def test_layer_at_level_0(self):
        layer = QProduct()
        convert_model(layer, 'L0')
        x = torch.randn(4, 32, requires_grad=True)
        assert layer(x.exp(), x.sin()).grad_fn.name() == 'MulBackward0'


def test_handlers_have_the_arguments_of_functions():
    """Each compressed function is registered with a layer of the package."""
    entries = {
        entry
        for entry in default_registry.functions.values()
        if isinstance(entry, FunctionEntry)
    }
    assert {entry.name for entry in entries} >= {'relu', 'linear', 'product'}
    for entry in entries:
        assert entry.layer in default_registry.layers
        assert entry.compress.__doc__
