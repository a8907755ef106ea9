"""QSiLU and QSwish against their parents."""

import copy
import math
import pickle

import pytest
import torch
from mmcv.cnn.bricks.swish import Swish
from support.layer_cases import LAYOUTS
from support.layers import (
    assert_same_bits,
    at_level,
    count_packs,
    gradients,
    relative_error,
    rounding_variance,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import (
    LEVELS,
    QSiLU,
    RoundingGenerator,
    convert_model,
    measure_activations,
)
from mmactnn.adapters.mmcv import QSwish
from mmactnn.codes.quantizer import LayerQuantizer

SIZES = ((), (1,), (7,), (0, 4, 8, 8), (3, 17), (3, 5, 9, 11), (2, 2, 2, 2, 3))
PARENTS = {QSiLU: nn.SiLU, QSwish: Swish}

both = pytest.mark.parametrize('cls', PARENTS, ids=lambda cls: cls.__name__)


def make(cls, bits=8, **kwargs):
    layer = cls(bits=bits, **kwargs)
    # Rounding that does not depend on the tests before.
    layer.quantizer.generator = RoundingGenerator(seed=0)
    return layer


def make_input(device, size=(3, 5, 9, 11), dtype=torch.float32):
    return (3 * torch.randn(size)).to(device, dtype)


def derivative(x):
    leaf = x.detach().double().requires_grad_()
    nn.functional.silu(leaf).sum().backward()
    return leaf.grad


def through(layer, x, grad_output):
    """Gradients of a layer amid a graph, so that it may work in place."""
    leaf = x.detach().requires_grad_()
    inner = leaf * 1
    output = layer(inner)
    assert (output is inner) == getattr(layer, 'inplace', False)
    output.backward(grad_output)
    return dict(output=output.detach(), input=leaf.grad)


class TestAgainstTheParent:
    @both
    @in_turn(dtype=[torch.float32, torch.bfloat16], size=SIZES)
    def test_dtypes_and_sizes(self, cls, dtype, size, device):
        x = make_input(device, size, dtype)
        grad_output = torch.randn_like(x)
        expected = gradients(PARENTS[cls](), x, grad_output)
        found = gradients(make(cls), x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert found['input'].dtype == dtype
        # A step of 8 bits, and what bfloat16 rounds on the way.
        error = (found['input'] - expected['input']).abs()
        limit = (1.2 / 255 + 0.02 * (dtype != torch.float32)) * (
            grad_output.abs() + 1e-6
        )
        assert (error <= limit).all()

    @both
    @in_turn(layout=tuple(LAYOUTS))
    def test_layouts(self, cls, layout, device):
        x = LAYOUTS[layout](make_input(device))
        grad_output = LAYOUTS['channels_last'](torch.randn(x.shape).to(x))
        expected = gradients(PARENTS[cls](), x, grad_output)
        found = gradients(make(cls), x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert found['output'].stride() == expected['output'].stride()
        assert found['input'].stride() == expected['input'].stride()
        assert relative_error(found['input'], expected['input']) < 0.01

    def test_in_place(self, device):
        x = make_input(device)
        grad_output = torch.randn_like(x)
        expected = through(nn.SiLU(inplace=True), x, grad_output)
        found = through(make(QSiLU, inplace=True), x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert relative_error(found['input'], expected['input']) < 0.01

    def test_in_place_on_a_leaf(self, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        before = leaf.tolist()
        with pytest.raises(RuntimeError, match='leaf Variable'):
            make(QSiLU, inplace=True)(leaf)
        assert leaf.tolist() == before

    @both
    @in_turn(how=['L0', 'eval', 'rule'])
    def test_exact(self, cls, how, device, monkeypatch):
        packed = count_packs(monkeypatch)
        layer = nn.Sequential(PARENTS[cls]())
        level = dict(base='L2', rules={'0': None}) if how == 'rule' else 'L3'
        convert_model(layer, 'L0' if how == 'L0' else level)
        assert type(layer[0]) is cls
        layer.train(how != 'eval')
        x = make_input(device)
        grad_output = torch.randn_like(x)
        expected = gradients(PARENTS[cls](), x, grad_output)
        found = gradients(layer, x, grad_output)
        assert not packed
        for key, value in expected.items():
            assert_same_bits(found[key], value)

    @both
    @in_turn(dtype=[torch.float16, torch.bfloat16])
    def test_autocast(self, cls, dtype, device):
        conv = nn.Conv2d(5, 4, 1, device=device)
        x = make_input(device)

        def run(layer):
            leaf = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype):
                output = layer(conv(leaf))
            output.backward(torch.ones_like(output))
            return output.detach(), leaf.grad

        found, expected = run(make(cls)), run(PARENTS[cls]())
        assert found[0].dtype == dtype
        assert_same_bits(found[0], expected[0])
        assert relative_error(found[1], expected[1]) < 0.02


class TestGradient:
    @both
    def test_unbiased_with_the_variance_of_rounding(self, cls, device):
        layer = make(cls, bits=2)
        x = make_input(device, (4, 300))
        grad_output = torch.randn_like(x)
        draws = torch.stack(
            [gradients(layer, x, grad_output)['input'] for _ in range(256)]
        ).double()
        exact = derivative(x).to(device)
        quantizer = LayerQuantizer(2, 256, RoundingGenerator(seed=1))
        payload = quantizer.pack(exact.float())
        noise = rounding_variance(exact, payload)
        variance = noise * grad_output**2
        # In units of what rounding predicts, where it is no rare event.
        varies = noise > 0.02 * noise.amax()
        error = draws.mean(0) - exact * grad_output
        z = (error / (variance / 256).sqrt())[varies]
        assert 0.9 < z.square().mean() < 1.1
        assert z.abs().max() < 5
        ratio = (draws.var(0) / variance)[varies]
        assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
        # To keep the input at so few bits would be a bias of this size.
        codes = torch.stack(
            [derivative(layer.quantizer.pack(x).unpack()) for _ in range(64)]
        ).mean(0)
        bias = (codes.to(device) - exact)[varies] * grad_output[varies]
        assert bias.abs().mean() > 5 * error[varies].abs().mean()

    @both
    @in_turn(value=[math.nan, math.inf])
    def test_what_is_not_finite_shows(self, cls, value, device):
        x = make_input(device, (2, 300))
        x[1, 7] = value
        found = gradients(make(cls), x, None)['input']
        expected = gradients(PARENTS[cls](), x, None)['input']
        assert not found[~expected.isfinite()].isfinite().any()
        assert found[0].isfinite().all()

    @both
    def test_double_backward(self, cls, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        loss = make(cls)(leaf).square().sum()
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f'{cls.__name__}.*twice'):
            grad.sum().backward()

    @both
    @in_turn(use_reentrant=[False, True])
    def test_checkpoint(self, cls, use_reentrant, device):
        x = make_input(device).requires_grad_()
        y = checkpoint(make(cls), x, use_reentrant=use_reentrant)
        y.sum().backward()
        assert relative_error(x.grad, derivative(x)) < 0.01

    @both
    def test_retain_graph(self, cls, device):
        x = make_input(device).requires_grad_()
        y = make(cls)(x).sum()
        y.backward(retain_graph=True)
        once = x.grad.clone()
        y.backward()
        assert torch.equal(x.grad, 2 * once)


class TestWhatIsKept:
    @both
    @in_turn(bits=[2, 4, 8])
    def test_codes_by_closed_form(self, cls, bits, device):
        x = make_input(device, (2, 3, 5, 7)).requires_grad_()
        with saved_tensors() as saved:
            make(cls, bits)(x)
        codes, ranges = saved
        assert codes.nbytes == 2 * math.ceil(105 / 8) * bits
        assert ranges.nbytes == 2 * 1 * 4

    @pytest.mark.parametrize('inplace', [False, True])
    @pytest.mark.parametrize('level', ['L0', 'L1', 'L3'])
    @both
    def test_meter(self, cls, level, inplace, device):
        if cls is QSwish and inplace:
            pytest.skip('Swish never works in place')
        kwargs = dict(inplace=True) if inplace else {}

        def run(layer):
            layer(make_input(device).requires_grad_() * 1)

        with saved_tensors() as saved:
            run(PARENTS[cls](**kwargs))
        sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved}
        layer = nn.Sequential(PARENTS[cls](**kwargs))
        convert_model(layer, level)
        with measure_activations(layer) as meter:
            run(layer)
        assert meter.exact_bytes == sum(sizes.values())
        if level != 'L0':
            bits = LEVELS[level].act
            kept = meter.exact_bytes * bits / 32 / len(sizes)
            assert meter.saved_bytes == pytest.approx(kept, rel=0.1)

    @both
    def test_without_grad(self, cls, device, monkeypatch):
        packed = count_packs(monkeypatch)
        x = make_input(device)
        assert_same_bits(make(cls)(x), PARENTS[cls]()(x))
        with torch.no_grad():
            make(cls)(x.requires_grad_())
        assert not packed


class TestSettings:
    @pytest.mark.parametrize(
        ('level', 'bits'),
        [('L0', None), ('L1', 8), ('L2', 4), ('L3', 4), (dict(act=3), 3)],
        ids=str,
    )
    @both
    def test_level(self, cls, level, bits):
        layer = at_level(nn.Sequential(PARENTS[cls]()), level)[0]
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

    @both
    def test_float64(self, cls, device):
        x = make_input(device, dtype=torch.float64).requires_grad_()
        with pytest.raises(TypeError, match='torch.float64'):
            make(cls)(x)

    @both
    def test_there_and_back(self, cls):
        plain = PARENTS[cls]()
        layer = cls.from_float(plain, bits=3)
        assert type(layer) is cls and layer.quantizer.bits == 3
        assert type(layer.to_float()) is PARENTS[cls]
        layer.revert_()
        assert vars(layer).keys() == vars(plain).keys()

    @both
    @in_turn(
        duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_duplicates(self, cls, duplicate):
        twin = duplicate(make(cls, bits=3))
        assert type(twin) is cls and twin.quantizer.bits == 3
        assert 'bits=3' in repr(twin)
