"""Convolutions of MMCV and MMDetection against their parents."""

import copy

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from support.layers import assert_same_bits, relative_error
from torch import nn

from mmactnn import convert_model, measure_activations

SIZE = (2, 8, 15, 12)
COMMON = dict(kernel_size=3, padding=1)


def deformable(name, module):
    return lambda: _imported(f'mmcv.ops.{module}', name)(8, 6, **COMMON)


def normed(**kwargs):
    def make():
        module = 'mmdet.models.layers.normed_predictor'
        return _imported(module, 'NormedConv2d')(8, 6, **COMMON, **kwargs)

    return make


def _imported(module, name):
    return getattr(pytest.importorskip(module), name)


MAKERS = {
    'standardised': lambda: ConvWS2d(8, 6, **COMMON, stride=2),
    'without bias': lambda: ConvWS2d(8, 6, **COMMON, bias=False, groups=2),
    'adaptively': lambda: ConvAWS2d(8, 6, **COMMON),
    'padding': lambda: Conv2dAdaptivePadding(8, 6, 3, stride=2),
    'even kernel': lambda: Conv2dAdaptivePadding(8, 6, 4, dilation=2),
    'no padding': lambda: Conv2dAdaptivePadding(8, 6, 1),
    'normalised': normed(power=0.5),
    'normalised kernels': normed(norm_over_kernel=True, bias=False),
    'deformable': deformable('DeformConv2dPack', 'deform_conv'),
    'modulated': deformable(
        'ModulatedDeformConv2dPack', 'modulated_deform_conv'
    ),
}
every = pytest.mark.parametrize('name', MAKERS)


class Between(nn.Module):
    """The layer amid a graph, so that its input is no leaf."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x * 1)


def make(name):
    torch.manual_seed(0)
    layer = MAKERS[name]()
    for parameter in layer.parameters():
        # Offsets between pixels, away from borders of cells.
        nn.init.normal_(parameter, std=0.1)
    return Between(layer)


def converted(model, level):
    twin = copy.deepcopy(model)
    convert_model(twin, level)
    assert type(twin.layer).__name__ == f'Q{type(model.layer).__name__}'
    return twin


def gradients(model, x, grad_output):
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output.backward(grad_output)
    found = {n: p.grad for n, p in model.named_parameters()}
    return dict(found, output=output.detach(), x=leaf.grad)


def both(name, level):
    model = make(name)
    x = torch.randn(SIZE)
    grad_output = torch.randn_like(model(x))
    twin = converted(model, level)
    return gradients(model, x, grad_output), gradients(twin, x, grad_output)


@every
def test_bit_for_bit_at_the_exact_level(name):
    expected, found = both(name, 'L0')
    for key, value in expected.items():
        assert_same_bits(found[key], value)


@every
@pytest.mark.parametrize('level', ['L1', 'L3'])
def test_forward_pass_is_exact(name, level):
    expected, found = both(name, level)
    assert_same_bits(found['output'], expected['output'])


@every
def test_input_gradient_at_8_bits(name):
    level = dict(base='L1', conv=8)
    expected, found = both(name, level)
    for key, value in expected.items():
        # Offsets have a convolution of their own, and a rounded gradient.
        is_exact = key == 'x' and not hasattr(make(name).layer, 'conv_offset')
        limit = 1e-5 if is_exact else 0.02
        assert relative_error(found[key], value) < limit, key


@every
def test_unbiased(name):
    model = make(name)
    x = torch.randn(SIZE)
    grad_output = torch.randn_like(model(x))
    expected = gradients(model, x, grad_output)
    twin = converted(model, 'L2')
    total, single, draws = {}, {}, 24
    for _ in range(draws):
        twin.zero_grad()
        for key, value in gradients(twin, x, grad_output).items():
            total[key] = total.get(key, 0) + value.double() / draws
            single[key] = relative_error(value, expected[key])
    key = 'layer.weight'
    assert single[key] > 0.02
    # Of a mean of 24 draws, and far from that of one.
    assert relative_error(total[key], expected[key]) < 0.4 * single[key]


@every
def test_keeps_codes(name):
    model = converted(make(name), 'L2')
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    with measure_activations(model) as meter:
        model(x)
    # Offsets and modulation stay.
    assert meter.exact_bytes - meter.saved_bytes > 0.8 * x.nbytes


@every
def test_evaluation_is_the_parent(name):
    model = make(name)
    twin = converted(model, 'L3').eval()
    x = torch.randn(SIZE)
    assert_same_bits(twin(x), model.eval()(x))


def test_second_derivative_is_refused():
    model = converted(make('standardised'), 'L2')
    x = torch.randn(SIZE, requires_grad=True)
    (grad,) = torch.autograd.grad(
        model(x).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match='cannot be differentiated twice'):
        grad.sum().backward()


def test_nothing_of_the_weight_is_kept():
    layer = ConvWS2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    model = Between(layer)
    convert_model(model, 'L2')
    with measure_activations(model) as meter:
        model(x)
    weight = layer.weight.nbytes
    assert meter.exact_bytes >= 2 * weight + x.nbytes
    assert meter.saved_bytes < 0.05 * weight
