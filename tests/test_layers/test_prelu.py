"""QPReLU against torch's."""

import copy

import pytest
import torch
from support.layers import (
    assert_same_bits,
    at_level,
    gradients,
    relative_error,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn

from mmactnn import QPReLU, convert_model

SHAPES = ((3, 4), (3, 4, 7, 5), (2, 4, 3), (0, 4, 3, 3), (2, 4, 2, 3, 2))
COUNTS = (1, 4)


def make(count, bits=8, dtype=torch.float32):
    layer = QPReLU(count, bits=bits)
    nn.init.normal_(layer.weight)
    return layer.to(dtype)


def twin_of(layer):
    twin = nn.PReLU(layer.num_parameters)
    twin.weight.data = layer.weight.data.clone()
    return twin


@in_turn(shape=SHAPES, count=COUNTS)
def test_exact_but_for_the_slope(shape, count):
    layer = make(count)
    x = torch.randn(shape)
    x.flatten()[:2] = 0
    grad_output = torch.randn(shape)
    expected = gradients(twin_of(layer), x, grad_output)
    found = gradients(layer, x, grad_output)
    assert_same_bits(found['output'], expected['output'])
    assert_same_bits(found['input'], expected['input'])
    if x.numel():
        assert relative_error(found['weight'], expected['weight']) < 0.05


@in_turn(dtype=[torch.float16, torch.bfloat16], count=COUNTS)
def test_half(dtype, count):
    layer = make(count, dtype=dtype)
    x, grad_output = torch.randn(2, 3, 4, 5, 6).to(dtype)
    expected = gradients(twin_of(layer), x, grad_output)
    found = gradients(layer, x, grad_output)
    assert_same_bits(found['output'], expected['output'])
    torch.testing.assert_close(found['input'], expected['input'])
    assert found['weight'].dtype == dtype
    assert relative_error(found['weight'], expected['weight']) < 0.1


def test_layouts():
    layer = make(4)
    x = torch.randn(2, 4, 6, 5)
    grad_output = torch.randn(2, 4, 6, 5)
    expected = gradients(twin_of(layer), x, grad_output)
    for memory in (
        x.contiguous(memory_format=torch.channels_last),
        x.repeat_interleave(2, dim=-1)[..., ::2],
    ):
        found = gradients(layer, memory, grad_output)
        assert torch.equal(found['input'], expected['input'])
        assert relative_error(found['weight'], expected['weight']) < 0.05


def test_nan_and_infinity():
    layer = make(1)
    x = torch.tensor([[float('inf'), -float('inf'), float('nan'), -1.0]])
    grad_output = torch.randn_like(x)
    expected = gradients(twin_of(layer), x, grad_output)
    found = gradients(layer, x, grad_output)
    assert_same_bits(found['output'], expected['output'])
    assert_same_bits(found['input'], expected['input'])


@pytest.mark.parametrize('count', COUNTS)
def test_slope_is_unbiased(count):
    layer = make(count, bits=1)
    x, grad_output = torch.randn(2, 4, 4, 9, 9)
    expected = gradients(twin_of(layer), x, grad_output)['weight']
    draws = torch.stack(
        [gradients(layer, x, grad_output)['weight'] for _ in range(200)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - expected).abs() < 4 * error).all()


def test_exact_level():
    layer = at_level(make(4), 'L0')
    x, grad_output = torch.randn(2, 3, 4, 5)
    expected = gradients(twin_of(layer), x, grad_output)
    found = gradients(layer, x, grad_output)
    for key, value in expected.items():
        assert_same_bits(found[key], value)


def test_keeps_three_bits():
    layer = make(1, bits=2)
    x = torch.randn(8, 4, 32, 32, requires_grad=True)
    with saved_tensors() as kept:
        layer(x * 1)
    nbytes = sum(t.nbytes for t in kept if t is not layer.weight)
    assert nbytes < 1.1 * x.numel() * 3.2 / 8


def test_frozen_slope_keeps_a_bit():
    layer = make(1)
    layer.weight.requires_grad_(False)
    x = torch.randn(8, 4, 32, 32, requires_grad=True)
    with saved_tensors() as kept:
        layer(x * 1)
    assert sum(t.nbytes for t in kept if t is not layer.weight) == 4096
    layer(x).sum().backward()
    twin = twin_of(layer)
    expected = gradients(twin, x.detach(), None)['input']
    assert x.grad.shape == expected.shape


def test_conversion_and_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    twin = copy.deepcopy(model)
    convert_model(model, 'L2')
    assert type(model[1]) is QPReLU
    x = torch.randn(3, 4)
    assert_same_bits(model(x), twin(x))
    assert_same_bits(model.eval()(x), twin(x))


def test_second_derivative_is_refused():
    layer = make(1)
    x = torch.randn(3, 4, requires_grad=True)
    loss = layer(x).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match='QPReLU cannot be differentiated'):
        grad.sum().backward()
