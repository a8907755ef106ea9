"""QGate against the product."""

import copy
import math

import pytest
import torch
from support.layer_cases import LAYOUTS
from support.layers import (
    assert_same_bits,
    at_level,
    count_packs,
    relative_error,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn

from mmactnn import RoundingGenerator, convert_model, measure_activations
from mmactnn.layers import QConv2d, QGate
from mmactnn.layers.gate import Gate


def make(bits=8):
    layer = QGate(bits=bits)
    layer.quantizer.generator = RoundingGenerator(seed=0)
    return layer


@pytest.fixture
def x(device):
    return torch.randn(3, 4, 9, 7, device=device) + 0.3


@pytest.fixture
def factor(device):
    return torch.rand(3, 4, 1, 1, device=device)


def run(layer, x, factor, grad_output=None):
    x, factor = (t.detach().clone().requires_grad_() for t in (x, factor))
    output = layer(x, factor)
    if grad_output is None:
        grad_output = torch.ones_like(output)
    output.backward(grad_output)
    return dict(output=output.detach(), input=x.grad, gate=factor.grad)


@in_turn(layout=tuple(LAYOUTS))
def test_against_the_product(layout, x, factor):
    x = LAYOUTS[layout](x)
    grad_output = torch.randn_like(x)
    expected = run(Gate(), x, factor, grad_output)
    found = run(make(), x, factor, grad_output)
    assert_same_bits(found['output'], expected['output'])
    assert_same_bits(found['input'], expected['input'])
    assert found['gate'].shape == factor.shape
    assert 0 < relative_error(found['gate'], expected['gate']) < 0.02


@pytest.mark.parametrize('level', ['L0', 'eval'])
def test_exact(level, x, factor, monkeypatch):
    packed = count_packs(monkeypatch)
    layer = at_level(QGate(), 'L3' if level == 'eval' else level)
    layer.train(level != 'eval')
    expected, found = run(Gate(), x, factor), run(layer, x, factor)
    assert not packed
    for key, value in expected.items():
        assert_same_bits(found[key], value)


def test_gradient_of_the_gate_is_unbiased(x, factor):
    layer = make(bits=2)
    grad_output = torch.randn_like(x)
    exact = run(Gate(), x, factor, grad_output)['gate'].double()
    draws = torch.stack(
        [run(layer, x, factor, grad_output)['gate'] for _ in range(256)]
    ).double()
    z = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(256))
    assert 0.4 < z.square().mean() < 1.9
    assert z.abs().max() < 5


@in_turn(dtype=[torch.float16, torch.bfloat16])
def test_mixed_dtypes(dtype, x, factor):
    """As autocast leaves them: a map in half precision, or its gate."""
    for left, right in ((x.to(dtype), factor), (x, factor.to(dtype))):
        expected, found = run(Gate(), left, right), run(make(), left, right)
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert relative_error(found[key], value) < 0.02


def test_what_is_kept(x, factor):
    x, factor = x.requires_grad_(), factor.requires_grad_()
    with saved_tensors() as saved:
        make(bits=2)(x, factor)
    sizes = sorted(t.nbytes for t in saved)
    assert sizes == [3 * 4, factor.nbytes, 3 * math.ceil(4 * 63 / 8) * 2]
    layer = QGate()
    with measure_activations(layer) as meter:
        layer(x, factor)
    assert meter.exact_bytes == x.nbytes + factor.nbytes


def test_frozen_gate_keeps_no_input(x, factor, monkeypatch):
    packed = count_packs(monkeypatch)
    x.requires_grad_()
    make()(x, factor).sum().backward()
    assert not packed
    assert_same_bits(x.grad, factor.expand_as(x))


def test_payload_is_shared(x, factor, device, monkeypatch):
    """An input that a convolution reads, too, is packed once."""
    packed = count_packs(monkeypatch)
    x = x.requires_grad_() * 1
    conv = QConv2d(4, 4, 1, device=device)
    (conv(x).sum() + QGate()(x, factor.requires_grad_()).sum()).backward()
    assert len(packed) == 1


def test_bits():
    model = nn.Sequential(QGate(), QGate(bits=5), Gate())
    convert_model(model, dict(base='L3', conv=2.5, rules={'2': 7}))
    assert [layer.quantizer.bits for layer in model] == [2, 5, 7]
    assert all(layer.quantizer.layer_bits is None for layer in model)
    twin = copy.deepcopy(model[1])
    assert type(twin) is QGate and twin.quantizer.bits == 5
    assert type(twin.to_float()) is Gate


def test_double_backward(x, factor):
    x, factor = x.requires_grad_(), factor.requires_grad_()
    loss = make()(x, factor).square().sum()
    (grad,) = torch.autograd.grad(loss, factor, create_graph=True)
    with pytest.raises(RuntimeError, match='QGate.*twice'):
        grad.sum().backward()
