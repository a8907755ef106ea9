"""Smooth activations against their parents."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from mmcv.cnn.bricks.hsigmoid import HSigmoid
from mmcv.cnn.bricks.swish import Swish
from support.layer_cases import LAYOUTS
from support.layers import (
    assert_same_bits,
    at_level,
    count_packs,
    gradients,
    relative_error,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import (
    LEVELS,
    QELU,
    QGELU,
    QHardsigmoid,
    QHardswish,
    QLinear,
    QMish,
    QSigmoid,
    QSiLU,
    QSoftplus,
    QTanh,
    RoundingGenerator,
    convert_model,
    measure_activations,
)
from mmactnn.adapters.mmcv import QHSigmoid, QSwish
from mmactnn.codes.cache import PayloadCache
from mmactnn.codes.payload import SmoothTensor

SIZES = ((), (1,), (7,), (0, 4, 8, 8), (3, 17), (3, 5, 9, 11), (2, 2, 2, 2, 3))

# Layers, by arguments of their own.
PARENTS = {
    'GELU': (QGELU, nn.GELU, {}),
    'GELU, tanh': (QGELU, nn.GELU, dict(approximate='tanh')),
    'SiLU': (QSiLU, nn.SiLU, {}),
    'Swish': (QSwish, Swish, {}),
    'Mish': (QMish, nn.Mish, {}),
    'Softplus': (QSoftplus, nn.Softplus, {}),
    'Softplus, sharp': (QSoftplus, nn.Softplus, dict(beta=3, threshold=5)),
    'Hardswish': (QHardswish, nn.Hardswish, {}),
    'ELU': (QELU, nn.ELU, dict(alpha=1.5)),
    'Sigmoid': (QSigmoid, nn.Sigmoid, {}),
    'Tanh': (QTanh, nn.Tanh, {}),
}
MASKS = {
    'Hardsigmoid': (QHardsigmoid, nn.Hardsigmoid, {}),
    'HSigmoid': (QHSigmoid, HSigmoid, dict(bias=1.0, divisor=2.0)),
}
# With a variant in place.
IN_PLACE = ('SiLU', 'Mish', 'Hardswish', 'ELU', 'Hardsigmoid')
# One code serves two.
JOINT = ('GELU', 'GELU, tanh', 'SiLU', 'Swish', 'Mish', 'Softplus')
EVERY = {**PARENTS, **MASKS}

every = in_turn(name=tuple(EVERY))
every_coded = in_turn(name=tuple(PARENTS))


def make(name, bits=8, joint=True, **kwargs):
    cls, _, arguments = EVERY[name]
    if name in PARENTS:
        kwargs['bits'] = bits
    with warnings.catch_warnings():
        # HSigmoid tells about its defaults.
        warnings.simplefilter('ignore')
        layer = cls(**arguments, **kwargs)
    # Rounding that does not depend on the tests before.
    layer.quantizer.generator = RoundingGenerator(seed=0)
    layer.quantizer.joint_act = joint
    return layer


def make_plain(name, **kwargs):
    _, parent, arguments = EVERY[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return parent(**arguments, **kwargs)


def make_input(device, size=(3, 5, 9, 11), dtype=torch.float32):
    return (2 * torch.randn(size)).to(device, dtype)


def derivative(name, x):
    leaf = x.detach().double().requires_grad_()
    (make_plain(name)(leaf) * 1).sum().backward()
    return leaf.grad


def through(layer, x, grad_output):
    """Gradients of a layer amid a graph, so that it may work in place."""
    leaf = x.detach().requires_grad_()
    inner = leaf * 1
    output = layer(inner)
    assert (output is inner) == getattr(layer, 'inplace', False)
    output.backward(grad_output)
    return dict(output=output.detach(), input=leaf.grad)


def assert_near(name, found, expected, grad_output, bits=8):
    """Within the noise of rounding, and what a half rounds on the way."""
    dtype = expected.dtype
    if name in MASKS:
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
        return
    # An 8-bit step of inputs that span 12, with slopes up to 1.
    limit = 0.05 + 0.02 * (dtype != torch.float32)
    error = (found - expected).abs()
    assert (error <= limit * (grad_output.abs() + 1e-6)).all()


class TestAgainstTheParent:
    @in_turn(
        name=tuple(EVERY), dtype=[torch.float32, torch.bfloat16], size=SIZES
    )
    def test_dtypes_and_sizes(self, name, dtype, size, device):
        x = make_input(device, size, dtype)
        grad_output = torch.randn_like(x)
        expected = gradients(make_plain(name), x, grad_output)
        for joint in (False, True):
            found = gradients(make(name, joint=joint), x, grad_output)
            assert_same_bits(found['output'], expected['output'])
            assert found['input'].dtype == dtype
            assert_near(name, found['input'], expected['input'], grad_output)

    @in_turn(name=tuple(EVERY), layout=tuple(LAYOUTS))
    def test_layouts(self, name, layout, device):
        x = LAYOUTS[layout](make_input(device))
        grad_output = LAYOUTS['channels_last'](torch.randn(x.shape).to(x))
        expected = gradients(make_plain(name), x, grad_output)
        for joint in (False, True):
            found = gradients(make(name, joint=joint), x, grad_output)
            assert_same_bits(found['output'], expected['output'])
            assert found['output'].stride() == expected['output'].stride()
            assert found['input'].stride() == expected['input'].stride()
            assert_near(name, found['input'], expected['input'], grad_output)

    @in_turn(name=IN_PLACE, layout=['contiguous', 'gaps'])
    def test_in_place(self, name, layout, device):
        x = LAYOUTS[layout](make_input(device))
        grad_output = torch.randn_like(x)
        expected = through(make_plain(name, inplace=True), x, grad_output)
        found = through(make(name, inplace=True), x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_near(name, found['input'], expected['input'], grad_output)

    @in_turn(name=IN_PLACE)
    def test_in_place_on_a_leaf(self, name, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        before = leaf.tolist()
        with pytest.raises(RuntimeError, match='leaf Variable'):
            make(name, inplace=True)(leaf)
        assert leaf.tolist() == before

    @in_turn(name=tuple(EVERY), how=['L0', 'eval', 'rule'])
    def test_exact(self, name, how, device, monkeypatch):
        packed = count_packs(monkeypatch)
        layer = nn.Sequential(make_plain(name))
        level = dict(base='L2', rules={'0': None}) if how == 'rule' else 'L3'
        convert_model(layer, 'L0' if how == 'L0' else level)
        assert type(layer[0]) is EVERY[name][0]
        layer.train(how != 'eval')
        x = make_input(device)
        grad_output = torch.randn_like(x)
        with saved_tensors() as saved:
            expected = gradients(make_plain(name), x, grad_output)
        with saved_tensors() as kept:
            found = gradients(layer, x, grad_output)
        assert [t.shape for t in kept] == [t.shape for t in saved]
        assert not packed
        for key, value in expected.items():
            assert_same_bits(found[key], value)

    @in_turn(name=tuple(EVERY), dtype=[torch.float16, torch.bfloat16])
    def test_autocast(self, name, dtype, device):
        conv = nn.Conv2d(5, 4, 1, device=device)
        x = make_input(device)

        def run(layer):
            leaf = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype):
                output = layer(conv(leaf))
            output.backward(torch.ones_like(output))
            return output.detach(), leaf.grad

        found, expected = run(make(name)), run(make_plain(name))
        assert found[0].dtype == expected[0].dtype
        assert_same_bits(found[0], expected[0])
        assert relative_error(found[1], expected[1]) < 0.03


class TestGradient:
    @every_coded
    def test_codes_of_the_derivative_are_unbiased(self, name, device):
        layer = make(name, bits=2, joint=False)
        x = make_input(device, (4, 300))
        grad_output = torch.randn_like(x)
        draws = torch.stack(
            [gradients(layer, x, grad_output)['input'] for _ in range(256)]
        ).double()
        exact = derivative(name, x).to(device)
        smooth = layer.smooth_function()
        step = (smooth.high - smooth.low) / 3
        variance = (step * grad_output).double() ** 2 / 12
        error = draws.mean(0) - exact * grad_output
        z = error / (variance / 256).sqrt()
        assert 0.85 < z.square().mean() < 1.15
        assert z.abs().max() < 5
        ratio = draws.var(0) / variance
        assert float(ratio.mean()) == pytest.approx(1, abs=0.05)

    @in_turn(name=JOINT, bits=[3, 4, 8])
    def test_one_code_has_little_bias(self, name, bits, device):
        layer = make(name, bits=bits)
        x = make_input(device, (8, 256))
        grad_output = torch.randn_like(x)
        draws = torch.stack(
            [gradients(layer, x, grad_output)['input'] for _ in range(64)]
        ).double()
        exact = derivative(name, x).to(device) * grad_output
        one = (draws - exact).square().mean().sqrt()
        mean = (draws.mean(0) - exact).square().mean().sqrt()
        bias = (mean**2 - one**2 / 64).clamp(min=0).sqrt()
        # 0.15 at 3 bits for inputs that are twice as large as usual.
        assert bias < (0.2 if bits == 3 else 0.1) * one

    @in_turn(value=[math.nan, math.inf])
    def test_what_is_not_finite_shows(self, value, device):
        for name in PARENTS:
            x = make_input(device, (2, 512))
            x[1, 7] = value
            expected = gradients(make_plain(name), x, None)['input']
            for joint in (False, True):
                layer = make(name, joint=joint)
                found = gradients(layer, x, None)['input']
                assert not found[~expected.isfinite()].isfinite().any()
                assert found[0].isfinite().all()

    @every_coded
    def test_double_backward(self, name, device):
        for joint in (False, True):
            leaf = torch.randn(4, 7, device=device, requires_grad=True)
            loss = make(name, joint=joint)(leaf).square().sum()
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            refused = f'{EVERY[name][0].__name__}.*twice'
            with pytest.raises(RuntimeError, match=refused):
                grad.sum().backward()

    @in_turn(name=tuple(MASKS))
    def test_second_derivative_of_a_mask(self, name, device):
        leaf = make_input(device, (4, 7)).requires_grad_()

        def second(layer):
            loss = layer(leaf * leaf).square().sum()
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            return torch.autograd.grad(grad.sum(), leaf)[0]

        expected = 12 * leaf.detach() ** 2 * 0
        if name == 'HSigmoid':
            expected = second(make_plain(name))
        else:
            # torch has no such derivative. y = (x^2 + 3) / 6 within.
            x = leaf.detach()
            inside = x.square() < 3
            expected = ((12 * x**2 + 12) / 36).where(inside, 0.0)
        torch.testing.assert_close(second(make(name)), expected)

    @in_turn(name=tuple(EVERY), use_reentrant=[False, True])
    def test_checkpoint(self, name, use_reentrant, device):
        x = make_input(device).requires_grad_()
        y = checkpoint(make(name), x, use_reentrant=use_reentrant)
        y.sum().backward()
        assert relative_error(x.grad, derivative(name, x)) < 0.03

    @every
    def test_retain_graph(self, name, device):
        x = make_input(device).requires_grad_()
        y = make(name)(x).sum()
        y.backward(retain_graph=True)
        once = x.grad.clone()
        y.backward()
        assert torch.equal(x.grad, 2 * once)


class TestWhatIsKept:
    @in_turn(name=tuple(PARENTS), bits=[2, 4, 8])
    def test_codes_by_closed_form(self, name, bits, device):
        x = make_input(device, (2, 3, 5, 7)).requires_grad_()
        with saved_tensors() as saved:
            make(name, bits)(x)
        if name in JOINT and bits > 2:
            codes, ranges = saved
            assert codes.nbytes == 2 * math.ceil(105 / 8) * bits
            assert ranges.nbytes == 2 * 1 * 4
        else:
            (codes,) = saved
            assert codes.nbytes == math.ceil(210 / 8) * bits + 1

    @in_turn(name=tuple(MASKS))
    def test_masks_by_closed_form(self, name, device):
        x = make_input(device, (2, 3, 5, 7)).requires_grad_()
        with saved_tensors() as saved:
            make(name)(x)
        (codes,) = saved
        assert codes.nbytes == math.ceil(210 / 8) + 1

    @in_turn(
        where=lambda name, inplace, **_: not inplace or name in IN_PLACE,
        by='name',
        name=tuple(EVERY),
        level=['L0', 'L1', 'L3'],
        inplace=[False, True],
    )
    def test_meter(self, name, level, inplace, device):
        kwargs = dict(inplace=True) if inplace else {}

        def run(layer):
            layer(make_input(device).requires_grad_() * 1)

        with saved_tensors() as saved:
            run(make_plain(name, **kwargs))
        sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved}
        layer = nn.Sequential(make_plain(name, **kwargs))
        convert_model(layer, level)
        with measure_activations(layer) as meter:
            run(layer)
        assert meter.exact_bytes == sum(sizes.values())
        if level != 'L0':
            bits = 1 if name in MASKS else LEVELS[level].act
            kept = meter.exact_bytes * bits / 32 / len(sizes)
            assert meter.saved_bytes == pytest.approx(kept, rel=0.1)

    @every
    def test_without_grad(self, name, device):
        x = make_input(device)
        with saved_tensors() as saved:
            assert_same_bits(make(name)(x), make_plain(name)(x))
            with torch.no_grad():
                make(name)(x.requires_grad_())
        assert not saved


class FeedForward(nn.Module):
    """Two layers with an activation between, as in a transformer."""

    def __init__(self, act, last=None):
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.act = act
        self.last = last or nn.Linear(64, 16)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


class TestOneCodeForTwo:
    def saved_at(self, level, act, x, last=None):
        torch.manual_seed(0)
        model = FeedForward(act, last)
        convert_model(model, level)
        with measure_activations(model) as meter:
            model(x)
        return meter.saved_bytes

    @in_turn(name=JOINT)
    def test_memory(self, name, device):
        x = torch.randn(64, 8, 32)
        level = dict(base='L2', act=4, conv=2)
        saved = self.saved_at(level, make_plain(name), x)
        # x at 2 bits; one code of 4 bits for 64 channels, and ranges.
        elements = 64 * 8
        expected = elements * (32 * 2 + 64 * 4) / 8
        assert expected < saved < 1.06 * expected
        apart = self.saved_at(
            dict(level, joint_act=False), make_plain(name), x
        )
        assert apart > saved + 0.95 * elements * 64 * 2 / 8

    def test_conv_reads_it(self, device):
        torch.manual_seed(0)
        x = torch.randn(2, 8, 16, 16, device=device)
        model = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True), nn.Conv2d(8, 4, 3)
        ).to(device)
        plain = copy.deepcopy(model)
        convert_model(model, dict(base='L2', fuse=False, act=8))
        with measure_activations(model) as meter:
            model(x.clone())
        # 4 bits for the image, 8 for both layers behind it, and ranges.
        assert meter.saved_bytes < 1.05 * x.numel() * 12 / 8
        found = gradients(model, x, None)
        expected = gradients(plain, x, None)
        assert_same_bits(found['output'], expected['output'])
        for key, value in expected.items():
            assert relative_error(found[key], value) < 0.1

    def test_gradients_of_a_feed_forward(self, device):
        torch.manual_seed(0)
        model = FeedForward(nn.GELU()).to(device)
        plain = copy.deepcopy(model)
        x = torch.randn(16, 16, 32, device=device)
        grad_output = torch.randn(16, 16, 16, device=device)
        expected = gradients(plain, x, grad_output)

        def error(count, **level):
            convert_model(model, dict(base='L2', **level))
            draws = [gradients(model, x, grad_output) for _ in range(count)]
            mean = {
                key: torch.stack([draw[key] for draw in draws]).mean(0)
                for key in expected
            }
            return {
                key: relative_error(mean[key], value)
                for key, value in expected.items()
            }

        joint = dict(conv=2, act=4)
        one = error(1, **joint)
        mean = error(32, **joint)
        for key in ('input', 'last.weight', 'first.bias'):
            assert 0.005 < one[key] < 0.15
            assert mean[key] < 2 * one[key] / math.sqrt(32)
        # At the same memory, 2 bits for each of the two are worse.
        apart = error(1, conv=2, act=2)
        assert apart['input'] > 1.3 * one['input']
        assert apart['last.weight'] > 2 * one['last.weight']

    def test_payload(self, device):
        cache = PayloadCache()
        layer = make('GELU', bits=4)
        layer.quantizer.cache = cache
        x = make_input(device, (8, 256)).requires_grad_()
        output = layer(x)
        payload = cache.get(output)
        assert type(payload) is SmoothTensor and not payload.rectified
        whole = payload.unpack()
        assert relative_error(whole, output) < 0.15
        assert torch.equal(payload.unpack(2, 5), whole[2:5])
        parts = [part for _, part in payload.chunks(2 * 256 * 4)]
        assert len(parts) == 4 and torch.equal(torch.cat(parts), whole)
        assert payload.nbytes == 8 * 128 + 8 * 4
        output.data.mul_(2)
        if device.type == 'cpu':
            assert cache.get(output) is None

    def test_reader_with_more_bits_of_its_own(self, device):
        x = torch.randn(64, 8, 32)
        level = dict(base='L2', act=4, conv=2)
        saved = self.saved_at(level, nn.GELU(), x, QLinear(64, 16, bits=6))
        apart = self.saved_at(level, nn.GELU(), x)
        assert saved - apart > 0.95 * 64 * 8 * 64 * 6 / 8

    @in_turn(settings=[dict(act=2), dict(rounding='stochastic')])
    def test_where_codes_are_those_of_the_derivative(self, settings, device):
        layer = at_level(
            nn.Sequential(nn.GELU()), dict(base='L2', **settings)
        )[0]
        x = make_input(device, (8, 256)).requires_grad_()
        with saved_tensors() as saved:
            output = layer(x)
        assert len(saved) == 1
        assert layer.quantizer.cache.get(output) is None


class TestSettings:
    @in_turn(
        name=tuple(PARENTS),
        level=[('L0', None), ('L1', 8), ('L3', 4), (dict(act=3), 3)],
    )
    def test_level(self, name, level):
        level, bits = level
        layer = at_level(nn.Sequential(make_plain(name)), level)[0]
        assert layer.quantizer.bits == bits
        # No level shares them out.
        assert layer.quantizer.layer_bits is None

    def test_rule_and_constructor(self):
        model = nn.Sequential(QSiLU(bits=6), QSiLU(bits=6))
        convert_model(model, dict(base='L3', rules={'0': 1}))
        assert [layer.quantizer.bits for layer in model] == [1, 6]

    @in_turn(bits=[0, 9, 2.5])
    def test_errors(self, bits):
        with pytest.raises(ValueError, match=f'bits.*got {bits}'):
            QSiLU(bits=bits)
        with pytest.raises(ValueError, match=f'act bits.*got {bits}'):
            convert_model(nn.SiLU(), dict(act=bits))

    @every
    def test_float64(self, name, device):
        x = make_input(device, dtype=torch.float64).requires_grad_()
        with pytest.raises(TypeError, match='torch.float64'):
            make(name)(x)

    @every_coded
    def test_there_and_back(self, name):
        cls, parent, _ = EVERY[name]
        plain = make_plain(name)
        layer = cls.from_float(plain, bits=3)
        assert type(layer) is cls and layer.quantizer.bits == 3
        assert type(layer.to_float()) is parent
        layer.revert_()
        assert vars(layer).keys() == vars(plain).keys()

    @in_turn(
        name=tuple(PARENTS),
        duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    )
    def test_duplicates(self, name, duplicate):
        twin = duplicate(make(name, bits=3))
        assert type(twin) is EVERY[name][0] and twin.quantizer.bits == 3
        assert 'bits=3' in repr(twin)

    def test_negative_alpha_in_place(self, device):
        layer = QELU(-1.0, inplace=True, bits=4)
        plain = nn.ELU(-1.0, inplace=True)
        x = make_input(device)
        errors = []
        for module in (layer, plain):
            y = module(x.clone().requires_grad_() * 1)
            with pytest.raises(RuntimeError) as error:
                y.sum().backward()
            errors.append(str(error.value))
        assert errors[0] == errors[1]
