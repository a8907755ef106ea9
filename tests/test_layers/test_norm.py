"""QBatchNorm2d against torch's batch normalisation."""

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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmactnn import QBatchNorm, QBatchNorm2d, QReLU

# Constructor arguments of layers that behave differently.
VARIANTS = {
    'default': dict(),
    'no affine': dict(affine=False),
    'no running statistics': dict(track_running_stats=False),
    'neither': dict(affine=False, track_running_stats=False),
    'cumulative': dict(momentum=None),
    'other momentum and eps': dict(momentum=0.5, eps=0.1),
}


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def make_norm(device, bits=2, cls=QBatchNorm2d, dtype=None, **kwargs):
    norm = cls(4, bits=bits, device=device, dtype=dtype, **kwargs)
    # Values that no layer starts with, so that all of them matter.
    with torch.no_grad():
        if norm.affine:
            norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0, 0.1]))
            norm.bias.copy_(torch.tensor([0.1, -0.2, 0.0, 1.0]))
        if norm.track_running_stats:
            norm.running_mean.copy_(torch.tensor([0.2, 0.0, -0.4, 1.0]))
            norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    return norm


def make_input(device, dtype=None, size=(3, 4, 9, 10)):
    return (torch.randn(size, device=device) * 2 + 0.5).to(dtype)


def in_float64(norm, x, grad_output):
    """Torch's gradients in float64 on the CPU."""
    twin = exact_twin(norm).double().cpu()
    return gradients(twin, x.double().cpu(), grad_output.double().cpu())


def assert_same_buffers(norm, twin):
    found, expected = dict(norm.named_buffers()), dict(twin.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        assert_same_bits(buffer, expected[name])


class TestExactLevel:
    @in_turn(name=tuple(VARIANTS), training=[True, False])
    def test_bit_for_bit(self, name, training, device):
        source = exact_twin(make_norm(device, **VARIANTS[name]))
        norm = at_level(copy.deepcopy(source), 'L0').train(training)
        source.train(training)
        assert type(norm) is QBatchNorm2d and norm.quantizer.exact
        for _ in range(2):
            x = make_input(device)
            grad_output = torch.randn_like(x)
            expected = gradients(source, x, grad_output)
            for key, value in gradients(norm, x, grad_output).items():
                assert_same_bits(value, expected[key])
        assert_same_buffers(norm, source)


class TestTraining:
    @in_turn(name=tuple(VARIANTS), bits=[1, 2, 4, 8])
    def test_forward_and_running_statistics(self, name, bits, device):
        norm = make_norm(device, bits, **VARIANTS[name])
        twin = exact_twin(norm)
        for _ in range(3):
            x = make_input(device).requires_grad_()
            assert_same_bits(norm(x), twin(x))
            assert_same_buffers(norm, twin)

    @in_turn(name=tuple(VARIANTS))
    def test_gradients(self, name, device, monkeypatch):
        packed = count_packs(monkeypatch)
        norm = make_norm(device, bits=8, **VARIANTS[name])
        x = make_input(device)
        grad_output = torch.randn_like(x)
        expected = in_float64(norm, x, grad_output)
        found = gradients(norm, x, grad_output)
        assert len(packed) == 1
        assert found.keys() == expected.keys()
        assert relative_error(found['input'], expected['input']) < 5e-3
        if norm.affine:
            assert relative_error(found['weight'], expected['weight']) < 0.05
            assert (
                relative_error(found['bias'], expected['bias']) < FLOAT32_ERROR
            )

    @in_turn(layout=['channels_last', 'gaps'])
    def test_layouts(self, layout, device):
        norm = make_norm(device, bits=8)
        plain = make_input(device)
        if layout == 'channels_last':
            x = plain.contiguous(memory_format=torch.channels_last)
        else:
            x = plain.repeat_interleave(2, dim=-1)[..., ::2]
            assert not x.is_contiguous()
        twin = exact_twin(norm)
        grad_output = torch.randn_like(x)
        expected = gradients(twin, x, grad_output)
        found = gradients(norm, x, grad_output)
        assert found['output'].stride() == expected['output'].stride()
        assert_same_bits(found['output'], expected['output'])
        reference = in_float64(norm, plain, grad_output)
        assert relative_error(found['input'], reference['input']) < 5e-3
        assert relative_error(found['weight'], reference['weight']) < 0.05
        assert relative_error(found['bias'], reference['bias']) < FLOAT32_ERROR

    @in_turn(frozen=['weight', 'bias'])
    def test_partly_frozen(self, frozen, device):
        norm = make_norm(device, bits=8)
        getattr(norm, frozen).requires_grad_(False)
        x = make_input(device)
        grad_output = torch.randn_like(x)
        expected = in_float64(norm, x, grad_output)
        found = gradients(norm, x, grad_output)
        assert found[frozen] is None
        assert relative_error(found['input'], expected['input']) < 5e-3
        other = {'weight': 'bias', 'bias': 'weight'}[frozen]
        assert relative_error(found[other], expected[other]) < 0.05

    def test_constant_channel(self, device):
        # The range of its groups is a single value: nothing to round.
        norm = make_norm(device)
        x = torch.full((2, 4, 8, 8), 0.3, device=device)
        expected = gradients(exact_twin(norm), x, torch.randn_like(x))
        found = gradients(norm, x, torch.randn_like(x))
        assert_same_bits(found['output'], expected['output'])
        assert found['input'].isfinite().all()


class TestStatistics:
    @staticmethod
    def draw(norm, x, grad_output, count):
        """Count gradients of input and weight, stacked, in float64."""
        x = x.clone().requires_grad_()
        draws = [
            torch.autograd.grad(norm(x), (x, norm.weight), grad_output)
            for _ in range(count)
        ]
        return [torch.stack(part).double() for part in zip(*draws)]

    @pytest.mark.parametrize(
        ('bits', 'training'),
        [(1, True), (2, True), (2, False), (8, True), (4, False)],
    )
    def test_weight(self, bits, training, device):
        """Unbiased, with the variance of the closed form."""
        norm = make_norm(device, bits).train(training)
        trained = trained_beside(norm)
        assert trained.training
        # 4 groups of 256 elements a sample, one for each channel.
        x = make_input(device, size=(3, 4, 16, 16))
        grad_output = torch.randn_like(x)
        exact = in_float64(norm, x, grad_output)['weight'].to(device)
        few, many = 32, 512
        draws = self.draw(norm, x, grad_output, many)[1]

        noise = rounding_variance(x, norm.quantizer.pack(x))
        var = x.double().var((0, 2, 3), correction=0)
        if not training:
            var = torch.tensor([0.5, 1.0, 2.0, 3.0]).to(var)
        variance = (grad_output.double() ** 2 * noise).sum((0, 2, 3))
        variance = variance / (var + norm.eps)
        found = draws.var(0)
        spread = (2 / (many - 1)) ** 0.5
        assert (found / variance - 1).abs().max() < 5 * spread

        # Sixteen times as many draws, a quarter of the error, at any bits.
        for count in (few, many):
            means = draws.view(-1, count, 4).mean(1)
            z = (means - exact) / (variance / count).sqrt()
            assert z.abs().max() < 4.5
            assert z.square().mean().sqrt() < 2
        few_means = draws.view(-1, few, 4).mean(1)
        z = (few_means - exact) / (variance / few).sqrt()
        # Over 64 numbers; without any rounding it would be 0.
        assert z.square().mean().sqrt() > 0.6

    @pytest.mark.parametrize('bits', [1, 2, 4])
    def test_input(self, bits, device):
        """The bias of the input's gradient is of second order.

        It comes from an element's noise meeting itself in ``x_hat *
        mean(grad * x_hat)``: the noise's variance over the number of
        elements of the channel.
        """
        norm = make_norm(device, bits)
        x = make_input(device, size=(2, 4, 8, 8))
        grad_output = torch.randn_like(x)
        exact = in_float64(norm, x, grad_output)['input'].to(device)
        count = 1024
        draws = self.draw(norm, x, grad_output, count)[0]
        var, mean = torch.var_mean(
            x.double(), (0, 2, 3), correction=0, keepdim=True
        )
        invstd = (var + norm.eps).rsqrt()
        noise = rounding_variance(x, norm.quantizer.pack(x)) * invstd**2
        scale = norm.weight.detach().double().view(1, -1, 1, 1) * invstd
        bias = -scale * grad_output.double() * noise / (2 * 8 * 8)
        deviation = (draws.var(0) / count).sqrt()
        # Elements at the ends of a range hardly vary. Those of a channel err
        # together, so that they tell less than their number; but without the
        # bias it would be above 2 at 1 and at 2 bits.
        varies = deviation > 1e-3 * deviation.mean()
        z = ((draws.mean(0) - exact - bias) / deviation)[varies]
        assert varies.float().mean() > 0.9
        assert 0.6 < z.square().mean().sqrt() < 1.6
        assert z.abs().max() < 5
        # Without the closed form of the bias the means would be off.
        assert bias.norm() < 0.1 * exact.norm()


def trained_beside(norm):
    """A layer in training mode, of the same model and called before."""
    relu = QReLU()
    relu.quantizer.cache = norm.quantizer.cache
    relu(torch.ones(1, requires_grad=True))
    return relu


class TestRunningStatistics:
    """Eval mode, as of backbones with ``norm_eval=True``."""

    def test_trainable_affine(self, device, monkeypatch):
        packed = count_packs(monkeypatch)
        norm = make_norm(device, bits=8).eval()
        trained = trained_beside(norm)
        twin = exact_twin(norm)
        x = make_input(device)
        grad_output = torch.randn_like(x)
        found = gradients(norm, x, grad_output)
        assert len(packed) == 1
        assert_same_bits(found['output'], twin(x))
        assert_same_buffers(norm, twin)
        expected = in_float64(norm, x, grad_output)
        # Linear in the input, whose gradient is therefore exact.
        assert (
            relative_error(found['input'], expected['input']) < FLOAT32_ERROR
        )
        assert relative_error(found['bias'], expected['bias']) < FLOAT32_ERROR
        assert relative_error(found['weight'], expected['weight']) < 0.05
        # With the whole model in eval mode it is torch's layer.
        trained.eval()
        found = gradients(norm, x, grad_output)
        assert len(packed) == 1
        assert_same_bits(
            found['weight'], gradients(twin, x, grad_output)['weight']
        )

    @in_turn(name=['frozen', 'no affine', 'bias only'])
    def test_without_trainable_weight(self, name, device, monkeypatch):
        packed = count_packs(monkeypatch)
        norm = make_norm(device, affine=name != 'no affine').eval()
        norm.requires_grad_(False)
        if name == 'bias only':
            norm.bias.requires_grad_()
        trained = trained_beside(norm)
        x = make_input(device).requires_grad_()
        with saved_tensors() as saved:
            output = norm(x)
        assert trained.training and not packed
        # Values of a channel, not of an image.
        assert all(t.numel() <= 4 for t in saved)
        assert_same_bits(output, exact_twin(norm)(x))
        grad_output = torch.randn_like(x)
        output.backward(grad_output)
        expected = in_float64(norm, x, grad_output)
        assert relative_error(x.grad, expected['input']) < FLOAT32_ERROR
        if name == 'bias only':
            assert (
                relative_error(norm.bias.grad, expected['bias'])
                < FLOAT32_ERROR
            )

    def test_frozen_stage_keeps_nothing(self, device):
        norm = make_norm(device).eval().requires_grad_(False)
        with saved_tensors() as saved:
            output = norm(make_input(device))
        assert not saved and not output.requires_grad

    def test_without_running_statistics(self, device):
        # Torch's layer then takes those of the batch, in eval mode too.
        norm = make_norm(device, bits=8, track_running_stats=False).eval()
        x = make_input(device)
        grad_output = torch.randn_like(x)
        expected = in_float64(norm, x, grad_output)
        found = gradients(norm, x, grad_output)
        assert_same_bits(found['output'], exact_twin(norm)(x))
        assert relative_error(found['input'], expected['input']) < 5e-3

    def test_buffers_that_are_not_tracked_any_more(self, device):
        # As torch: they are neither read nor written in training mode.
        norm = make_norm(device)
        norm.track_running_stats = False
        twin = exact_twin(norm)
        for training in (True, False):
            norm.train(training), twin.train(training)
            x = make_input(device).requires_grad_()
            assert_same_bits(norm(x), twin(x))
            assert_same_buffers(norm, twin)

    def test_switching_modes(self, device):
        norm = make_norm(device)
        twin = exact_twin(norm)
        for training in (True, False, True):
            norm.train(training), twin.train(training)
            x = make_input(device).requires_grad_()
            assert_same_bits(norm(x), twin(x))
            assert_same_buffers(norm, twin)


class TestPrecision:
    @in_turn(
        dtype=[torch.float16, torch.bfloat16],
        layer_dtype=['same', 'float32'],
        training=[True, False],
    )
    def test_half(self, dtype, layer_dtype, training, device):
        norm = make_norm(
            device, 8, dtype=dtype if layer_dtype == 'same' else None
        ).train(training)
        x = make_input(device, dtype)
        grad_output = torch.randn_like(x)
        twin = exact_twin(norm)
        reference = in_float64(norm, x, grad_output)
        expected = gradients(twin, x, grad_output)
        found = gradients(norm, x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_same_buffers(norm, twin)
        for key, value in found.items():
            assert value.dtype == expected[key].dtype
            limit = 0.05 if key == 'weight' else 0.01
            assert relative_error(value, reference[key]) < limit

    @in_turn(dtype=[torch.float16, torch.bfloat16], training=[True, False])
    def test_autocast(self, dtype, training, device):
        norm = make_norm(device, 8).train(training)
        twin = exact_twin(norm)
        x = make_input(device)
        reference = in_float64(norm, x, torch.ones_like(x))

        def run(layer):
            leaf = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype):
                output = layer(leaf.to(dtype))
            output.backward(torch.ones_like(output))
            return output, leaf.grad, layer.weight.grad, layer.bias.grad

        found, expected = run(norm), run(twin)
        assert_same_bits(found[0], expected[0])
        assert_same_buffers(norm, twin)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert relative_error(found[3], reference['bias']) < 0.01

    @in_turn(
        value=['nan', 'inf', '-inf'], bits=[1, 2, 4, 8], training=[True, False]
    )
    def test_overflow_reaches_the_gradient(
        self, value, bits, training, device
    ):
        norm = make_norm(device, bits).train(training)
        x = make_input(device)
        x[1, 2, 4, 4] = float(value)
        found = gradients(norm, x, torch.ones_like(x))
        assert not found['weight'][2].isfinite()
        if not training:
            assert found['weight'][[0, 1, 3]].isfinite().all()


class TestAutograd:
    @in_turn(
        training=[True, False], mode=[torch.no_grad, torch.inference_mode]
    )
    def test_without_grad(self, mode, training, device, monkeypatch):
        packed = count_packs(monkeypatch)
        norm = make_norm(device).train(training)
        twin = exact_twin(norm)
        x = make_input(device).requires_grad_()
        with mode():
            output = norm(x)
        assert not output.requires_grad and not packed
        assert_same_bits(output, twin(x))
        assert_same_buffers(norm, twin)

    def test_codes_only(self, device):
        norm = make_norm(device)
        x = make_input(device, size=(3, 4, 8, 8)).requires_grad_()
        with saved_tensors() as saved:
            norm(x)
        large = [t for t in saved if t.numel() > 4]
        # Codes of 2 bits and two bfloat16 numbers for 256 elements.
        assert sum(t.nbytes for t in large) == x.numel() / 4 + 3 * 4

    def test_accumulation(self, device):
        norm = make_norm(device, bits=8)
        expected = 0
        for _ in range(3):
            x = make_input(device)
            grad_output = torch.randn_like(x)
            expected = expected + in_float64(norm, x, grad_output)['weight']
            norm(x).backward(grad_output)
        assert relative_error(norm.weight.grad, expected) < 0.05

    @in_turn(training=[True, False])
    def test_one_layer_twice_in_a_graph(self, training, device):
        norm = make_norm(device, bits=8).train(training)
        twin = exact_twin(norm).double()
        xs = [make_input(device), make_input(device, size=(2, 4, 5, 5))]
        sum((norm(x) ** 3).sum() for x in xs).backward()
        sum((twin(x.double()) ** 3).sum() for x in xs).backward()
        assert relative_error(norm.weight.grad, twin.weight.grad) < 0.05
        assert relative_error(norm.bias.grad, twin.bias.grad) < FLOAT32_ERROR

    @in_turn(training=[True, False])
    def test_retain_graph(self, training, device):
        norm = make_norm(device).train(training)
        x = make_input(device).requires_grad_()
        output = norm(x)
        leaves = (x, *norm.parameters())
        grad_output = torch.randn_like(output)

        def backward():
            return torch.autograd.grad(
                output, leaves, grad_output, retain_graph=True
            )

        for first, second in zip(backward(), backward()):
            assert_same_bits(first, second)

    @in_turn(use_reentrant=[False, True])
    def test_checkpoint(self, use_reentrant, device):
        norm = make_norm(device, bits=8)
        x = make_input(device)
        grad_output = torch.randn_like(x)
        reference = gradients(
            nn.Sequential(exact_twin(norm), nn.Tanh()).double().cpu(),
            x.double().cpu(),
            grad_output.double().cpu(),
        )

        def run(layer):
            leaf = x.clone().requires_grad_()
            block = nn.Sequential(layer, nn.Tanh())
            output = checkpoint(block, leaf, use_reentrant=use_reentrant)
            output.backward(grad_output)
            return leaf.grad

        twin = exact_twin(norm)
        run(twin)
        assert relative_error(run(norm), reference['input']) < 5e-3
        assert relative_error(norm.weight.grad, reference['0.weight']) < 0.05
        # Updated twice, here as there: recomputing is a forward pass too.
        assert_same_buffers(norm, twin)

    @in_turn(training=[True, False])
    def test_double_backward(self, training, device):
        norm = make_norm(device).train(training)
        trained = trained_beside(norm)
        assert trained.training
        x = make_input(device).requires_grad_()
        grads = torch.autograd.grad(
            norm(x).square().sum(), (x, *norm.parameters()), create_graph=True
        )
        for grad in grads:
            with pytest.raises(RuntimeError, match='QBatchNorm.*twice'):
                grad.sum().backward(retain_graph=True)


class TestModule:
    def test_class(self):
        norm = QBatchNorm2d(4)
        assert isinstance(norm, (nn.BatchNorm2d, _BatchNorm))
        # MMEngine's init_cfg compares the names of direct bases.
        assert _BatchNorm in QBatchNorm2d.__bases__
        assert norm.quantizer.bits == 2
        expected = nn.BatchNorm2d(4).state_dict()
        assert list(norm.state_dict()) == list(expected)

    @in_turn(
        duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_duplicates(self, duplicate, device):
        norm = make_norm(device, bits=8)
        twin = duplicate(norm)
        x = make_input(device).requires_grad_()
        before = copy.deepcopy(norm.state_dict())
        twin(x).sum().backward()
        assert type(twin) is QBatchNorm2d and twin.quantizer.bits == 8
        assert norm.weight.grad is None
        for key, value in norm.state_dict().items():
            assert_same_bits(value, before[key])

    @in_turn(name=['default', 'no affine'])
    def test_one_value_a_channel(self, name, device):
        norm = make_norm(device, **VARIANTS[name])
        x = torch.randn(1, 4, 1, 1, device=device, requires_grad=True)

        def error(layer):
            with pytest.raises(ValueError) as caught:
                layer(x)
            return str(caught.value)

        assert error(norm) == error(exact_twin(norm))
        norm.eval()(x)

    @in_turn(size=[(9, 4), (3, 4, 7), (2, 4, 3, 4, 5)])
    def test_any_rank(self, size, device):
        norm = make_norm(device, 8, cls=QBatchNorm)
        twin = nn.SyncBatchNorm(4).to(device)
        twin.load_state_dict(norm.state_dict())
        x = make_input(device, size=size)
        grad_output = torch.randn_like(x)
        reference = gradients(
            copy.deepcopy(twin).double(), x.double(), grad_output.double()
        )
        expected = gradients(twin, x, grad_output)
        found = gradients(norm, x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_same_buffers(norm, twin)
        assert relative_error(found['input'], reference['input']) < 0.02
        with pytest.raises(ValueError, match='got 1'):
            norm(torch.randn(4, device=device))
