"""QRMSNorm against its parent, and the payload that it shares."""

import copy
import math

import pytest
import torch
from support.layers import (
    assert_same_bits,
    at_level,
    exact_twin,
    gradients,
    relative_error,
)
from torch import nn

from mmactnn import (
    QRMSNorm,
    RoundingGenerator,
    convert_model,
    measure_activations,
)

CASES = {
    'tokens': (24, (3, 7, 24)),
    'several dimensions': ((5, 8), (3, 4, 5, 8)),
    'a vector': (9, (9,)),
    'no rows': (8, (0, 4, 8)),
}


def make(shape, **kwargs):
    layer = QRMSNorm(shape, bits=8, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    layer.quantizer.generator = RoundingGenerator(seed=0)
    return layer


class Block(nn.Module):
    """A normalisation and two linear layers behind it."""

    def __init__(self, width=64, **kwargs):
        super().__init__()
        self.norm = nn.RMSNorm(width, **kwargs)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, 2 * width)

    def forward(self, x):
        x = self.norm(x)
        return self.first(x).square().sum() + self.second(x).sum()


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize('case', CASES)
def test_output_and_gradients(device, case, dtype, affine):
    shape, size = CASES[case]
    layer = make(shape, elementwise_affine=affine).to(device, dtype)
    x = (torch.randn(size) + 0.3).to(device, dtype)
    # Gradients have a mean, which layer normalisation would subtract.
    grad_output = (torch.randn(size) + 1).to(device, dtype)
    ours = gradients(layer, x, grad_output)
    stock = gradients(exact_twin(layer), x, grad_output)
    assert_same_bits(ours['output'], stock['output'])
    assert ours.keys() == stock.keys()
    for name in ours.keys() - {'output'}:
        assert ours[name].dtype == stock[name].dtype
        assert ours[name].shape == stock[name].shape
        if x.numel():
            assert relative_error(ours[name], stock[name]) < 0.03


def test_autocast(device):
    layer = make(32).to(device)
    twin = exact_twin(layer)
    x = torch.randn(4, 6, 32, device=device)
    found = []
    for norm in (layer, twin):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            output = norm(leaf)
        output.square().sum().backward()
        found.append((output, leaf.grad, norm.weight.grad))
    assert_same_bits(found[0][0], found[1][0])
    for a, b in zip(*found):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 0.05


@pytest.mark.filterwarnings('ignore:Mismatch dtype')
def test_other_dtype_of_the_weight():
    """Torch has no kernel for it, and computes step by step."""
    layer = make(8)
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    output = layer(x)
    assert '_LayerNorm' not in output.grad_fn.name()
    assert_same_bits(output, exact_twin(layer)(x))


def test_errors():
    for affine in (False, True):
        layer = make(8, elementwise_affine=affine)
        with pytest.raises(RuntimeError, match='normalized_shape'):
            layer(torch.randn(4, 9, requires_grad=True))
    x = torch.randn(4, 8, requires_grad=True)
    loss = layer(x).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match='QRMSNorm cannot be'):
        grad.sum().backward()


def test_rows_that_are_not_finite():
    layer = make(256)
    x = torch.randn(6, 256)
    x[2, 5] = math.nan
    grad_output = torch.randn(6, 256)
    ours = gradients(layer, x, grad_output)['input']
    stock = gradients(exact_twin(layer), x, grad_output)['input']
    rows = [0, 1, 3, 4, 5]
    assert relative_error(ours[rows], stock[rows]) < 0.02
    assert ours[2].isnan().all()


def test_exact_level():
    layer = at_level(QRMSNorm(8), 'L0')
    node = layer(torch.randn(4, 8, requires_grad=True)).grad_fn
    assert '_LayerNorm' not in node.name()


def test_one_payload():
    block = Block()
    twin = copy.deepcopy(block)
    convert_model(block, dict(base='L3', rules={'norm': 3}))
    x = torch.randn(4, 32, 64, requires_grad=True)
    meters = []
    for each in (block, twin):
        with measure_activations(each) as meter:
            each.first(each.norm(x)).sum() + each.second(x).sum()
            meters.append(meter)
    # Codes, means of channels and scales of rows; another input's codes.
    codes = x.numel() * 3 // 8 + x.numel() // 256 * 4
    others = x.numel() * 2 // 8 + x.numel() // 256 * 4
    assert meters[0].saved_bytes <= codes + 64 * 4 + 4 * 32 * 4 + others + 256
    assert meters[0].exact_bytes == meters[1].saved_bytes


@pytest.mark.parametrize('rounding', ['dither', 'rotated'])
def test_unbiased(rounding):
    """The mean of gradients goes to the exact ones as it does without bias."""
    torch.manual_seed(0)
    block = Block(128)
    exact = copy.deepcopy(block).double()
    convert_model(
        block,
        dict(base='L3', rules={'norm': 2}, rounding=rounding),
        generator=RoundingGenerator(seed=1),
    )
    x = torch.randn(8, 16, 128) + 2 * torch.randn(128)

    def run(module, dtype):
        module.zero_grad()
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        module(leaf).backward()
        return [leaf.grad, module.norm.weight.grad, module.first.weight.grad]

    expected = run(exact, torch.float64)
    draws = 48
    found = [run(block, torch.float32) for _ in range(draws)]
    for values, value in zip(zip(*found), expected):
        stacked = torch.stack(values).double()
        single = (stacked - value).flatten(1).norm(dim=1).mean()
        mean = (stacked.mean(0) - value).norm()
        assert single > 0
        assert mean / single * math.sqrt(draws) < 1.3
