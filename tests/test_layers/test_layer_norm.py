"""QLayerNorm against its parent, and the payload that it shares."""

import copy
import math

import pytest
import torch
from support.layer_cases import LAYOUTS
from support.layers import (
    assert_same_bits,
    at_level,
    count_packs,
    exact_twin,
    gradients,
    relative_error,
    saved_tensors,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import (
    LEVELS,
    QLayerNorm,
    QLinear,
    RoundingGenerator,
    convert_model,
    measure_activations,
)

CASES = {
    'tokens': (24, (3, 7, 24)),
    'several dimensions': ((5, 8), (3, 4, 5, 8)),
    'rows': (9, (17, 9)),
    'windows': (16, (2, 3, 3, 4, 16)),
    'a vector': (9, (9,)),
    'all dimensions': ((4, 6), (4, 6)),
}

every_case = pytest.mark.parametrize('case', CASES)


def make(shape, bits=8, **kwargs):
    layer = QLayerNorm(shape, bits=bits, **kwargs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    # Rounding that does not depend on the tests before.
    layer.quantizer.generator = RoundingGenerator(seed=0)
    return layer


class Block(nn.Module):
    """A normalisation and two linear layers behind it."""

    def __init__(self, width=64, **kwargs):
        super().__init__()
        self.norm = nn.LayerNorm(width, **kwargs)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, 2 * width)

    def forward(self, x):
        x = self.norm(x)
        return self.first(x).sum() + self.second(x).sum()


class TestParity:
    @pytest.mark.parametrize('affine', [True, False, 'no bias'])
    @pytest.mark.parametrize(
        'dtype', [torch.float32, torch.float16, torch.bfloat16]
    )
    @every_case
    def test_output_and_gradients(self, device, case, dtype, affine):
        shape, size = CASES[case]
        layer = make(
            shape, elementwise_affine=bool(affine), bias=affine is True
        ).to(device, dtype)
        x = (torch.randn(size) + 0.3).to(device, dtype)
        grad_output = torch.randn(size).to(device, dtype)
        ours = gradients(layer, x, grad_output)
        stock = gradients(exact_twin(layer), x, grad_output)
        assert_same_bits(ours['output'], stock['output'])
        assert ours.keys() == stock.keys()
        for name in ours.keys() - {'output'}:
            assert ours[name].dtype == stock[name].dtype
            assert ours[name].shape == stock[name].shape
            assert relative_error(ours[name], stock[name]) < 0.03

    @pytest.mark.parametrize('layout', LAYOUTS)
    def test_layouts(self, device, layout):
        layer = make(10).to(device)
        x = LAYOUTS[layout](torch.randn(3, 4, 6, 10).to(device))
        grad_output = torch.randn(3, 4, 6, 10).to(device).mT.contiguous().mT
        ours = gradients(layer, x, grad_output)
        stock = gradients(exact_twin(layer), x, grad_output)
        assert_same_bits(ours['output'], stock['output'])
        for name in ours:
            assert relative_error(ours[name], stock[name]) < 0.02

    @pytest.mark.parametrize('size', [(0, 4, 8), (3, 0, 8), (1, 1, 8)])
    def test_few_rows(self, device, size):
        layer = make(8).to(device)
        x = torch.randn(size).to(device)
        ours = gradients(layer, x, None)
        stock = gradients(exact_twin(layer), x, None)
        for name in ours:
            assert ours[name].shape == stock[name].shape
            torch.testing.assert_close(
                ours[name], stock[name], atol=0.05, rtol=0.05
            )

    @pytest.mark.parametrize(
        'frozen', [['weight'], ['bias'], ['input'], ['input', 'weight']]
    )
    def test_frozen(self, frozen):
        layer = make(12)
        twin = exact_twin(layer)
        found = []
        for norm in (layer, twin):
            torch.manual_seed(0)
            x = torch.randn(5, 12, requires_grad='input' not in frozen)
            for name, parameter in norm.named_parameters():
                parameter.requires_grad_(name not in frozen)
            (norm(x) * torch.randn(5, 12)).sum().backward()
            found.append([x.grad, norm.weight.grad, norm.bias.grad])
        for a, b in zip(*found):
            assert (a is None) == (b is None)
            assert a is None or relative_error(a, b) < 0.03

    def test_only_the_bias_keeps_nothing(self):
        layer = make(12)
        layer.weight.requires_grad_(False)
        with saved_tensors() as saved:
            layer(torch.randn(500, 12))
        assert sum(t.nbytes for t in saved) < 500 * 12

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    def test_autocast(self, device, dtype):
        layer = make(32).to(device)
        twin = exact_twin(layer)
        x = torch.randn(4, 6, 32).to(device, dtype)
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

    def test_wrong_shape(self):
        with pytest.raises(RuntimeError, match='normalized_shape'):
            make(8)(torch.randn(4, 9, requires_grad=True))

    @pytest.mark.parametrize('bad', [math.nan, math.inf])
    def test_not_finite(self, bad):
        """Rows that are finite keep their gradients."""
        layer = make(256)
        twin = exact_twin(layer)
        x = torch.randn(6, 256)
        x[2, 5] = bad
        grad_output = torch.randn(6, 256)
        ours = gradients(layer, x, grad_output)['input']
        stock = gradients(twin, x, grad_output)['input']
        rows = [0, 1, 3, 4, 5]
        assert relative_error(ours[rows], stock[rows]) < 0.02
        assert stock[2].isnan().all() and ours[2].isnan().all()


class TestExact:
    @pytest.mark.parametrize('level', ['L0', 'L1'])
    def test_levels_without_codes(self, level):
        layer = at_level(make(8, bits=None), level)
        x = torch.randn(4, 8)
        ours = gradients(layer, x, torch.randn(4, 8))
        torch.manual_seed(0)
        for name, value in ours.items():
            assert value is not None, name
        node = layer(x).grad_fn
        assert 'NativeLayerNorm' in node.name()

    def test_evaluation(self):
        layer = make(8).eval()
        x = torch.randn(4, 8, requires_grad=True)
        output = layer(x)
        assert 'NativeLayerNorm' in output.grad_fn.name()
        assert_same_bits(output, exact_twin(layer)(x))

    def test_second_derivative(self):
        layer = make(8)
        x = torch.randn(4, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(
            layer(x).square().sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError, match='QLayerNorm cannot be'):
            grad.sum().backward()


@pytest.mark.parametrize(
    ('level', 'bits'), [('L0', None), ('L1', None), ('L2', 5), ('L3', 3)]
)
def test_bits_of_levels(level, bits):
    block = Block()
    convert_model(block, level)
    assert block.norm.quantizer.bits == bits
    assert block.norm.quantizer.layer_bits is None
    assert QLayerNorm.level_bits(LEVELS['L3S']) == 2


@pytest.mark.parametrize('rounding', ['dither', 'rotated', 'stochastic'])
@pytest.mark.parametrize('bits', [2, 4])
def test_unbiased(rounding, bits):
    """The mean of gradients goes to the exact ones as it does without bias."""
    torch.manual_seed(0)
    block = Block(128)
    exact = copy.deepcopy(block).double()
    convert_model(
        block,
        dict(base='L3', rules={'norm': bits}, rounding=rounding),
        generator=RoundingGenerator(seed=1),
    )
    # Channels have means of their own.
    x = torch.randn(8, 16, 128) + 2 * torch.randn(128)
    weights = torch.randn(8, 16, 128)

    def run(module, dtype):
        module.zero_grad()
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        y = module.norm(leaf)
        scaled = module.first(y) * weights.to(dtype)
        (scaled.sum() + module.second(y).square().mean()).backward()
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


def test_means_of_channels_take_no_range():
    """Offsets of channels do not enlarge the error."""

    def error(offsets):
        """Error over what is not a mean of a channel."""
        torch.manual_seed(0)
        norm = make(64, bits=2, elementwise_affine=False)
        x = torch.randn(4, 64, 64) + offsets * torch.randn(64)
        output = norm(x.requires_grad_())
        decoded = norm.quantizer.cache.get(output).unpack()
        output = output.detach()
        rest = output - output.mean((0, 1))
        return float((decoded - output).norm() / rest.norm())

    assert error(3.0) < 1.1 * error(0.0)


class TestSharing:
    @pytest.mark.parametrize('bits', [3, 8])
    def test_one_payload(self, bits):
        block = Block()
        convert_model(block, dict(base='L3', rules={'norm': bits}))
        x = torch.randn(4, 32, 64, requires_grad=True)
        with measure_activations(block) as meter:
            block(x)
        codes = x.numel() * bits // 8 + x.numel() // 256 * 4
        means, deviations = 64 * 4, 4 * 32 * 4
        assert meter.saved_bytes == codes + means + deviations
        # Input and output of the normalisation, mean and deviation.
        assert meter.exact_bytes == 2 * x.nbytes + 2 * deviations

    def test_linear_layers_decode_the_same(self):
        block = Block()
        convert_model(block, 'L3')
        x = torch.randn(4, 32, 64, requires_grad=True)
        output = block.norm(x)
        payload = block.norm.quantizer.cache.get(output)
        grad_output = torch.randn(4, 32, 64)
        block.first(output).backward(grad_output)
        expected = grad_output.flatten(0, 1).t() @ payload.unpack().flatten(
            0, 1
        )
        torch.testing.assert_close(block.first.weight.grad, expected)

    def test_autocast(self, monkeypatch):
        """The linear layers read a cast of the output."""
        block = Block()
        convert_model(block, dict(base='L3', rules={'norm': 8}))
        twin = copy.deepcopy(block)
        convert_model(twin, 'L0')
        packed = count_packs(monkeypatch)
        for module in (block, twin):
            x = torch.randn(4, 32, 64, requires_grad=True)
            torch.manual_seed(0)
            with torch.autocast('cpu', torch.bfloat16):
                (module(x)).backward()
        assert packed == [4]

    def test_strict_layers_have_their_own(self, monkeypatch):
        block = Block()
        convert_model(block, dict(base='L3', rules={'second': 8}))
        packed = count_packs(monkeypatch)
        block(torch.randn(4, 32, 64, requires_grad=True)).backward()
        assert packed == [4, 4]

    def test_changed_output(self, monkeypatch):
        norm, linear = make(16), QLinear(16, 4, bits=2)
        packed = count_packs(monkeypatch)
        y = norm(torch.randn(4, 16, requires_grad=True))
        linear(y.mul_(2)).sum().backward()
        assert len(packed) == 2

    def test_checkpointed_block(self):
        block = Block()
        convert_model(
            block,
            dict(base='L3', rules={'norm': 8}),
            generator=RoundingGenerator(seed=0),
        )
        x = torch.randn(4, 32, 64)
        grads = []
        for run in (
            block,
            lambda x: checkpoint(block, x, use_reentrant=False),
        ):
            block.zero_grad()
            leaf = x.clone().requires_grad_()
            run(leaf).backward()
            grads.append((leaf.grad, block.first.weight.grad))
        for a, b in zip(*grads):
            assert relative_error(a, b) < 0.02
