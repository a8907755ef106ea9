"""QConv2d against torch's convolution."""

import copy
import pickle

import pytest
import torch
from support.layers import (
    FLOAT32_ERROR,
    assert_same_bits,
    at_level,
    count_packs,
    exact_numerics,
    exact_twin,
    gradients,
    relative_error,
    rounding_variance,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import QConv2d, RoundingGenerator

GEOMETRIES = {
    'plain': dict(kernel_size=3),
    'pointwise': dict(kernel_size=1),
    'no bias': dict(kernel_size=3, padding=1, bias=False),
    'stride': dict(kernel_size=3, stride=2, padding=1),
    'oblong': dict(kernel_size=(3, 1), stride=(1, 2), padding=(1, 0)),
    'dilation': dict(kernel_size=3, padding=2, dilation=2),
    'groups': dict(kernel_size=3, padding=1, groups=2),
    'depthwise': dict(kernel_size=3, padding=1, groups=4),
    'same': dict(kernel_size=3, padding='same'),
    'same, odd': dict(kernel_size=(2, 4), padding='same'),
    'same, odd dilated': dict(kernel_size=4, padding='same', dilation=(3, 2)),
    'valid': dict(kernel_size=3, padding='valid'),
    'reflect': dict(kernel_size=3, padding=2, padding_mode='reflect'),
    'circular': dict(
        kernel_size=3, stride=2, padding=(1, 2), padding_mode='circular'
    ),
    'replicate': dict(kernel_size=3, padding=1, padding_mode='replicate'),
    'reflect, same': dict(
        kernel_size=4, padding='same', padding_mode='reflect'
    ),
}


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def make_conv(device, bits=2, out_channels=8, dtype=None, **kwargs):
    kwargs.setdefault('kernel_size', 3)
    return QConv2d(
        4, out_channels, bits=bits, device=device, dtype=dtype, **kwargs
    )


def make_input(device, dtype=None, size=(3, 4, 9, 10)):
    # The mean is not zero: a lost offset of the codes would show.
    return torch.randn(size, device=device, dtype=dtype) + 0.3


def in_float64(conv, x, grad_output):
    """Torch's gradients in float64 on the CPU."""
    twin = exact_twin(conv).double().cpu()
    return gradients(twin, x.double().cpu(), grad_output.double().cpu())


def not_contiguous(x):
    """The same values with gaps in memory."""
    spread = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    spread[..., ::2] = x
    return spread[..., ::2]


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'gaps': not_contiguous,
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


class TestExactLevel:
    @in_turn(name=tuple(GEOMETRIES))
    def test_bit_for_bit(self, name, device):
        conv = at_level(nn.Conv2d(4, 8, **GEOMETRIES[name]).to(device), 'L0')
        assert type(conv) is QConv2d and conv.quantizer.exact
        x = make_input(device)
        grad_output = torch.randn_like(conv(x))
        expected = gradients(exact_twin(conv), x, grad_output)
        for key, value in gradients(conv, x, grad_output).items():
            assert_same_bits(value, expected[key])

    def test_bits_of_the_constructor_outlive_the_level(self, device):
        conv = at_level(make_conv(device, bits=8), 'L2')
        assert conv.quantizer.bits == 8

    def test_exact_level_goes_before_bits_of_the_constructor(self, device):
        conv = at_level(make_conv(device, bits=8), 'L0')
        assert conv.quantizer.exact


class TestCompressed:
    @in_turn(name=tuple(GEOMETRIES))
    def test_output_and_gradients(self, name, device, monkeypatch):
        conv = make_conv(device, bits=8, **GEOMETRIES[name])
        x = make_input(device)
        expected = exact_twin(conv)(x).detach()
        grad_output = torch.randn_like(expected)

        packed = count_packs(monkeypatch)
        found = gradients(conv, x, grad_output)
        assert len(packed) == 1
        assert_same_bits(found.pop('output'), expected)
        expected = in_float64(conv, x, grad_output)
        # Codes of 8 bits err by about 1 %, and only the weight sees them.
        assert 1e-4 < relative_error(found['weight'], expected['weight'])
        assert relative_error(found['weight'], expected['weight']) < 0.03
        for key in found.keys() - {'weight'}:
            assert relative_error(found[key], expected[key]) < FLOAT32_ERROR

    @in_turn(
        weight_layout=['contiguous', 'channels_last'], layout=tuple(LAYOUTS)
    )
    def test_layouts(self, layout, weight_layout, device):
        conv = make_conv(device, bits=8, padding=1)
        if weight_layout == 'channels_last':
            conv.to(memory_format=torch.channels_last)
        plain = make_input(device)
        x = LAYOUTS[layout](plain)
        twin = exact_twin(conv)
        grad_output = torch.randn_like(twin(x))
        expected = gradients(twin, x, grad_output)
        found = gradients(conv, x, grad_output)
        assert found['output'].stride() == expected['output'].stride()
        assert_same_bits(found['output'], expected['output'])
        expected = in_float64(conv, plain, grad_output)
        assert (
            relative_error(found['input'], expected['input']) < FLOAT32_ERROR
        )
        assert relative_error(found['bias'], expected['bias']) < FLOAT32_ERROR
        assert relative_error(found['weight'], expected['weight']) < 0.03

    @in_turn(name=['plain', 'same, odd', 'reflect', 'circular'])
    def test_a_sample_alone(self, name, device):
        conv = make_conv(device, bits=8, **GEOMETRIES[name])
        x = make_input(device)[0]
        twin = exact_twin(conv)
        output = conv(x)
        assert output.dim() == 3
        assert_same_bits(output, twin(x))
        grad_output = torch.randn_like(output)
        found = gradients(conv, x, grad_output)
        expected = in_float64(conv, x, grad_output)
        assert found['input'].shape == x.shape
        assert (
            relative_error(found['input'], expected['input']) < FLOAT32_ERROR
        )
        assert relative_error(found['weight'], expected['weight']) < 0.03

    def test_one_layer_twice_in_a_graph(self, device):
        # As the heads of a detector, shared by all levels of a pyramid.
        conv = make_conv(device, bits=8)
        twin = exact_twin(conv).double()
        xs = [make_input(device), make_input(device, size=(2, 4, 5, 5))]
        sum((conv(x) ** 2).sum() for x in xs).backward()
        sum((twin(x.double()) ** 2).sum() for x in xs).backward()
        assert relative_error(conv.weight.grad, twin.weight.grad) < 0.03
        assert relative_error(conv.bias.grad, twin.bias.grad) < FLOAT32_ERROR

    def test_input_that_needs_no_gradient(self, device):
        conv = make_conv(device, bits=8)
        x = make_input(device)
        output = conv(x)
        grad_output = torch.randn_like(output)
        output.backward(grad_output)
        expected = in_float64(conv, x, grad_output)
        assert x.grad is None
        assert relative_error(conv.weight.grad, expected['weight']) < 0.03


class TestStatistics:
    """The gradient of the weight as a random variable."""

    @staticmethod
    def draw(conv, x, grad_output, count):
        """Sums of count draws and of their squares, in float64."""
        output = conv(x)
        total = torch.zeros_like(conv.weight, dtype=torch.float64)
        squares = total.clone()
        for _ in range(count):
            output = conv(x)
            (grad,) = torch.autograd.grad(output, conv.weight, grad_output)
            total += grad
            squares += grad.double() ** 2
        return total, squares

    @pytest.mark.parametrize('bits', [1, 2, 4, 8])
    def test_unbiased(self, bits, device):
        conv = make_conv(device, bits, padding=1, stride=2, bias=False)
        x = make_input(device)
        grad_output = torch.randn_like(conv(x))
        exact = in_float64(conv, x, grad_output)['weight'].to(device)
        few, many = 24, 384  # 16 times as many: a quarter of the error
        total, _ = self.draw(conv, x, grad_output, few)
        error_few = (total / few - exact).norm()
        total, squares = self.draw(conv, x, grad_output, many)
        error_many = (total / many - exact).norm()
        assert 3 < error_few / error_many < 5.3

        variance = squares / many - (total / many) ** 2
        z = (total / many - exact) / (variance / (many - 1)).sqrt()
        # 288 standard normal variables, some of them correlated.
        assert 0.8 < z.square().mean().sqrt() < 1.2
        assert abs(z.mean()) < 0.3
        assert z.abs().max() < 5

    @pytest.mark.parametrize('bits', [1, 2, 4, 8])
    def test_variance(self, bits, device):
        conv = make_conv(device, bits, kernel_size=1, bias=False)
        # 4 * 90 elements a sample: groups of 256 and of 104 elements.
        x = make_input(device)
        grad_output = torch.randn_like(conv(x))
        count = 512
        total, squares = self.draw(conv, x, grad_output, count)
        found = (squares - total**2 / count) / (count - 1)

        noise = rounding_variance(x, conv.quantizer.pack(x))
        expected = torch.einsum(
            'nohw,nchw->oc', grad_output.double() ** 2, noise
        )
        ratio = found.flatten() / expected.flatten()
        # A ratio is a chi-squared variable of 511 degrees over 511.
        spread = (2 / (count - 1)) ** 0.5
        assert abs(ratio.mean() - 1) < 0.05
        assert (ratio - 1).abs().max() < 5 * spread

    def test_draws_differ_and_follow_the_seed(self, device):
        conv = make_conv(device)
        x = make_input(device)

        def draw():
            return gradients(conv, x, None)['weight']

        conv.quantizer.generator = RoundingGenerator(seed=3)
        first, second = draw(), draw()
        assert not torch.equal(first, second)
        conv.quantizer.generator = RoundingGenerator(seed=3)
        assert_same_bits(draw(), first)
        conv.quantizer.generator = RoundingGenerator(seed=4)
        assert not torch.equal(draw(), first)


class TestPrecision:
    @in_turn(
        input_dtype=['same', 'float32'], dtype=[torch.float16, torch.bfloat16]
    )
    def test_autocast(self, dtype, input_dtype, device):
        conv = make_conv(device, bits=8, padding=1)
        x = make_input(device)
        if input_dtype == 'same':
            x = x.to(dtype)
        twin = exact_twin(conv)

        def run(layer):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype):
                output = layer(leaf)
            output.backward(grad_output)
            grads = dict(layer.named_parameters())
            grads = {key: value.grad for key, value in grads.items()}
            return dict(output=output, input=leaf.grad, **grads)

        with torch.autocast(device.type, dtype):
            grad_output = torch.randn_like(twin(x))
        assert grad_output.dtype == dtype
        expected, found = run(twin), run(conv)
        assert_same_bits(found['output'], expected['output'])
        reference = in_float64(conv, x, grad_output)
        for key, value in found.items():
            assert value.dtype == expected[key].dtype
            limit = 0.03 if key == 'weight' else 0.01
            assert relative_error(value, reference[key]) < limit
        assert conv.weight.grad.dtype == torch.float32

    def test_autocast_keeps_the_input_in_its_dtype(self, device):
        conv = make_conv(device)
        with (
            saved_tensors() as saved,
            torch.autocast(device.type, torch.bfloat16),
        ):
            conv(make_input(device))
        kept = [t for t in saved if t is not conv.weight]
        assert {t.dtype for t in kept} <= {torch.uint8, torch.bfloat16}

    @in_turn(value=['nan', 'inf', '-inf'], bits=[1, 2, 4, 8])
    def test_overflow_reaches_the_gradient(self, bits, value, device):
        conv = make_conv(device, bits)
        x = make_input(device)
        x[1, 2, 4, 4] = float(value)
        assert not conv(x).isfinite().all()
        # A finite gradient of the output: the codes alone must tell.
        grad = gradients(conv, x, torch.ones_like(conv(x)))['weight']
        assert not grad[:, 2].isfinite().any()


class TestWhatIsKept:
    def test_codes_only(self, device):
        conv = make_conv(device, bits=2)
        # 4 * 64 elements a sample: whole groups.
        x = make_input(device, size=(3, 4, 8, 8)).requires_grad_()
        with saved_tensors() as saved:
            conv(x)
        kept = [t for t in saved if t is not conv.weight]
        # 2 bits an element and, for 256 of them, two bfloat16 numbers.
        assert sum(t.nbytes for t in kept) == x.numel() / 4 + 3 * 4
        assert len(saved) == len(kept) + 1

    @in_turn(bias=['trainable', 'frozen', 'none'])
    def test_frozen_weight_keeps_no_input(self, bias, device, monkeypatch):
        packed = count_packs(monkeypatch)
        conv = make_conv(device, bias=bias != 'none')
        conv.weight.requires_grad_(False)
        if bias == 'frozen':
            conv.bias.requires_grad_(False)
        x = make_input(device).requires_grad_()
        with saved_tensors() as saved:
            output = conv(x)
        assert all(t is conv.weight for t in saved) and not packed
        grad_output = torch.randn_like(output)
        output.backward(grad_output)
        expected = in_float64(conv, x, grad_output)
        assert relative_error(x.grad, expected['input']) < FLOAT32_ERROR
        assert conv.weight.grad is None
        if bias == 'trainable':
            assert (
                relative_error(conv.bias.grad, expected['bias'])
                < FLOAT32_ERROR
            )

    def test_only_the_bias_is_trainable(self, device):
        conv = make_conv(device)
        conv.weight.requires_grad_(False)
        x = make_input(device)
        output = conv(x)
        grad_output = torch.randn_like(output)
        output.backward(grad_output)
        expected = in_float64(conv, x, grad_output)
        assert relative_error(conv.bias.grad, expected['bias']) < FLOAT32_ERROR


class TestAutograd:
    def test_accumulation(self, device):
        conv = make_conv(device, bits=8)
        xs = [make_input(device) for _ in range(3)]
        expected = 0
        for x in xs:
            output = conv(x)
            output.backward(torch.ones_like(output))
            expected = (
                expected
                + in_float64(conv, x, torch.ones_like(output))['weight']
            )
        assert relative_error(conv.weight.grad, expected) < 0.03

    def test_retain_graph(self, device):
        conv = make_conv(device)
        x = make_input(device).requires_grad_()
        output = conv(x)
        grad_output = torch.randn_like(output)
        leaves = (x, *conv.parameters())

        def backward():
            return torch.autograd.grad(
                output, leaves, grad_output, retain_graph=True
            )

        for first, second in zip(backward(), backward()):
            assert_same_bits(first, second)

    @in_turn(use_reentrant=[False, True])
    def test_checkpoint(self, use_reentrant, device):
        conv = make_conv(device, bits=8, padding=1)
        block = nn.Sequential(conv, nn.Tanh())
        x = make_input(device).requires_grad_()
        output = checkpoint(block, x, use_reentrant=use_reentrant)
        grad_output = torch.randn_like(output)
        output.backward(grad_output)

        twin = nn.Sequential(exact_twin(conv), nn.Tanh()).double().cpu()
        expected = gradients(twin, x.double().cpu(), grad_output.cpu())
        assert relative_error(x.grad, expected['input']) < FLOAT32_ERROR
        assert relative_error(conv.weight.grad, expected['0.weight']) < 0.03


class TestModule:
    @in_turn(
        duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_duplicates(self, duplicate, device):
        conv = make_conv(device, bits=8, group_size=64)
        twin = duplicate(conv)
        assert type(twin) is QConv2d
        assert twin.weight is not conv.weight
        assert twin.quantizer is not conv.quantizer
        assert twin.quantizer.bits == 8
        assert twin.quantizer.group_size == 64
        assert twin.quantizer.own == (8, 64)
        x = make_input(device)
        grad_output = torch.randn_like(twin(x))
        found = gradients(twin, x, grad_output)
        assert conv.weight.grad is None
        expected = in_float64(conv, x, grad_output)
        assert relative_error(found['weight'], expected['weight']) < 0.03


def test_float64_raises_under_autocast_too(device):
    conv = QConv2d(2, 2, 1).to(device)
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64, device=device)
    with (
        torch.autocast(device.type, dtype=torch.bfloat16),
        pytest.raises((TypeError, RuntimeError), match='ouble|float64'),
    ):
        conv(x)
