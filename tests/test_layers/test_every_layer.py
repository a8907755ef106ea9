"""Tests of all layers that keep codes of their input."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
from support.layer_cases import CASES, CLASSES, FAMILIES, LAYOUTS
from support.layers import (
    FLOAT32_ERROR,
    assert_same_bits,
    at_level,
    count_packs,
    exact_numerics,
    exact_twin,
    gradients,
    relative_error,
    saved_tensors,
)
from support.pairs import in_turn, in_turn_by_group
from torch import nn

from mmactnn import measure_activations

HALVES = (torch.float16, torch.bfloat16)
# Relative errors of gradients from codes of 8 bits. Those of parameters are
# sums in which signs cancel, of an error that does not.
INPUT_ERROR = 0.02
WEIGHT_ERROR = 0.05


def is_wrong_in_torch(case, device=None, **_):
    """Torch's reflection padding on CUDA.

    It has no deterministic backward in 3-D, and a wrong one in 2-D (0.1 off
    in torch 2.11).
    """
    reflects = case.kwargs.get('padding_mode') == 'reflect'
    return reflects and device is not None and device.type == 'cuda'


def every(cases):
    """Decorator that runs a test with some cases, family by family."""
    groups = {
        family: {
            name: dict(case=case)
            for name, case in members.items()
            if case in cases.values()
        }
        for family, members in FAMILIES.items()
    }
    groups = {family: members for family, members in groups.items() if members}
    return in_turn_by_group(groups, unless=is_wrong_in_torch)


every_case = every(CASES)
every_class = every(CLASSES)
every_layout = in_turn([dict(layout=layout) for layout in LAYOUTS])
every_half = in_turn([dict(dtype=dtype) for dtype in HALVES])
every_width = in_turn([dict(bits=bits) for bits in (1, 2, 4, 8)])


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def in_float64(layer, x, grad_output, **call):
    """Torch's gradients in float64 on the CPU."""
    twin = exact_twin(layer).double().cpu()
    x, grad_output = x.double().cpu(), grad_output.double().cpu()
    return gradients(twin, x, grad_output, **call)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert_same_bits(value, expected[key])


def assert_same_buffers(layer, twin):
    assert_same(dict(layer.named_buffers()), dict(twin.named_buffers()))


def assert_near(found, reference, case, *, error=FLOAT32_ERROR):
    """Exact but for what is computed from codes of 8 bits."""
    assert found.keys() == reference.keys()
    limits = dict(
        weight=WEIGHT_ERROR, input=error if case.linear else INPUT_ERROR
    )
    for key, value in found.items():
        limit = limits.get(key, error)
        assert relative_error(value, reference[key]) < limit, key


class TestExactLevel:
    @every_case
    @every_layout
    def test_bit_for_bit(self, case, layout, device):
        layer = at_level(case.make(device), 'L0')
        assert layer.quantizer.exact
        twin = exact_twin(layer)
        x = LAYOUTS[layout](case.make_input(device))
        grad_output = torch.randn_like(
            copy.deepcopy(twin)(x, **case.call).detach()
        )
        expected = gradients(twin, x, grad_output, **case.call)
        found = gradients(layer, x, grad_output, **case.call)
        assert_same(found, expected)
        assert found['output'].stride() == expected['output'].stride()
        assert_same_buffers(layer, twin)

    @every_case
    @every_half
    def test_half(self, case, dtype, device):
        layer = at_level(case.make(device, dtype=dtype), 'L0')
        twin = exact_twin(layer)
        x = case.make_input(device, dtype)
        assert_same(
            gradients(layer, x, None, **case.call),
            gradients(twin, x, None, **case.call),
        )

    @every_class
    def test_no_codes(self, case, device, monkeypatch):
        packed = count_packs(monkeypatch)
        layer = at_level(case.make(device), 'L0')
        layer(case.make_input(device).requires_grad_())
        assert not packed


class TestForward:
    @every_case
    @every_width
    def test_exact_at_any_bits(self, case, bits, device):
        layer = case.make(device, bits)
        twin = exact_twin(layer)
        for _ in range(2):
            x = case.make_input(device).requires_grad_()
            output, expected = layer(x, **case.call), twin(x, **case.call)
            assert_same_bits(output, expected)
            assert output.stride() == expected.stride()
            assert_same_buffers(layer, twin)

    @every_class
    @in_turn([dict(mode=torch.no_grad), dict(mode=torch.inference_mode)])
    def test_without_grad(self, case, mode, device, monkeypatch):
        packed = count_packs(monkeypatch)
        layer = case.make(device)
        twin = exact_twin(layer)
        x = case.make_input(device)
        with mode():
            output = layer(x)
        assert not output.requires_grad and not packed
        assert_same_bits(output, twin(x))
        assert_same_buffers(layer, twin)

    @every_case
    def test_eval(self, case, device):
        layer = case.make(device).eval()
        twin = exact_twin(layer)
        x = case.make_input(device)
        expected = gradients(twin, x, None, **case.call)
        found = gradients(layer, x, None, **case.call)
        assert_same_bits(found['output'], expected['output'])
        assert_same_buffers(layer, twin)
        has_statistics = getattr(layer, 'running_mean', None) is not None
        if 'BatchNorm' not in case.cls.__name__:
            assert_same(found, expected)
        elif has_statistics:
            # Linear in the input then, but the weight still sees codes.
            assert (
                relative_error(found['input'], expected['input'])
                < FLOAT32_ERROR
            )


class TestGradients:
    @every_case
    @every_layout
    def test_8_bits(self, case, layout, device, monkeypatch):
        packed = count_packs(monkeypatch)
        layer = case.make(device)
        plain = case.make_input(device)
        x = LAYOUTS[layout](plain)
        # That of a layer of any layout, and its own is another one.
        grad_output = torch.randn_like(
            copy.deepcopy(layer).eval()(x, **case.call).detach(),
            memory_format=torch.contiguous_format,
        )
        packed.clear()
        reference = in_float64(layer, plain, grad_output, **case.call)
        found = gradients(layer, x, grad_output, **case.call)
        assert len(packed) == 1
        assert_near(found, reference, case)
        # It is codes, after all, that the gradient comes from.
        seen = 'weight' if case.linear else 'input'
        assert relative_error(found[seen], reference[seen]) > 1e-5

    @every_case
    def test_no_samples(self, case, device):
        layer = case.make(device)
        twin = exact_twin(layer)
        x = case.make_input(device)[:0]
        try:
            expected = gradients(twin, x, None, **case.call)
        except RuntimeError as error:
            # Torch's own padding modes take no empty batch.
            with pytest.raises(RuntimeError) as caught:
                layer(x.requires_grad_(), **case.call)
            assert str(caught.value) == str(error)
            return
        assert_same(gradients(layer, x, None, **case.call), expected)
        assert_same_buffers(layer, twin)

    @every({n: case for n, case in CASES.items() if case.linear})
    def test_a_sample_alone(self, case, device):
        layer = case.make(device)
        x = case.make_input(device)[0]
        twin = exact_twin(layer)
        expected = twin(x, **case.call)
        grad_output = torch.randn_like(expected)
        found = gradients(layer, x, grad_output, **case.call)
        assert_same_bits(found['output'], expected.detach())
        reference = in_float64(layer, x, grad_output, **case.call)
        assert_near(found, reference, case)

    @every_class
    def test_only_one_parameter(self, case, device):
        for name in ('weight', 'bias'):
            layer = case.make(device)
            for key, parameter in layer.named_parameters():
                parameter.requires_grad_(key == name)
            x = case.make_input(device)
            output = layer(x)
            grad_output = torch.randn_like(output)
            reference = in_float64(layer, x, grad_output)
            output.backward(grad_output)
            for key, parameter in layer.named_parameters():
                if key != name:
                    assert parameter.grad is None
                    continue
                error = relative_error(parameter.grad, reference[key])
                limit = WEIGHT_ERROR if key == 'weight' else FLOAT32_ERROR
                assert error < limit

    @every_class
    @in_turn(bits=[1, 2, 4, 8], value=['nan', 'inf', '-inf'])
    def test_overflow_reaches_the_gradient(self, case, bits, value, device):
        layer = case.make(device, bits)
        x = case.make_input(device)
        x.select(-1, 1)[1] = float(value)
        # A finite gradient of the output: the codes alone must tell.
        found = gradients(layer, x, None)
        assert not found['output'].isfinite().all()
        assert not found['weight'].isfinite().all()
        expected = gradients(exact_twin(layer), x, None)
        finite = expected['weight'].isfinite()
        assert found['weight'][finite].isfinite().all()

    @every_case
    def test_output_may_be_overwritten(self, case, device):
        """By what follows in place, as ReLU does in many models."""
        layer = case.make(device)
        x = case.make_input(device).requires_grad_()
        output = layer(x, **case.call)
        grad_output = torch.randn_like(output)
        output.mul_(2).backward(grad_output)
        twin = at_level(layer, 'L0')
        expected = gradients(twin, x, 2 * grad_output, **case.call)['input']
        limit = FLOAT32_ERROR if case.linear else INPUT_ERROR
        assert relative_error(x.grad, expected) < limit

    @every_class
    def test_double_backward(self, case, device):
        layer = case.make(device)
        x = case.make_input(device).requires_grad_()
        loss = layer(x).square().sum()
        leaves = (x, *layer.parameters())
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match='Q.*twice'):
                grad.sum().backward(retain_graph=True)


def is_one_of_several_dimensions(name):
    """A case that there is in 2-D, too."""
    return name.startswith(('QConv1d', 'QConv3d', 'QConvTranspose'))


@every(
    {
        name: case
        for name, case in CASES.items()
        if 'no affine' not in name
        and ', 4-d' not in name
        and not (is_one_of_several_dimensions(name) and 'plain' not in name)
    }
)
def test_gradients_of_2_bits_are_unbiased(case, device):
    layer = case.make(device, bits=2)
    x = case.make_input(device)
    grad_output = torch.randn_like(layer(x, **case.call))
    exact = in_float64(layer, x, grad_output, **case.call)['weight'].to(device)

    def draw():
        output = layer(x, **case.call)
        (grad,) = torch.autograd.grad(output, layer.weight, grad_output)
        return grad.double()

    # The error of a mean falls as 1 / sqrt(n): 8 means of 8 draws and the
    # mean of all 64, each in units of what that predicts.
    draws = torch.stack([draw() for _ in range(64)])
    deviation = draws.std(0)
    varies = deviation > 1e-3 * deviation.mean()

    def standardised(count):
        means = draws.view(-1, count, *exact.shape).mean(1)
        z = (means - exact) / (deviation / math.sqrt(count))
        return z[:, varies]

    assert 0.7 < standardised(8).square().mean().sqrt() < 1.4
    assert standardised(64).abs().max() < 5


class TestPrecision:
    @every_case
    @every_half
    def test_half(self, case, dtype, device):
        layer = case.make(device, dtype=dtype)
        twin = exact_twin(layer)
        x = case.make_input(device, dtype)
        output = copy.deepcopy(twin)(x, **case.call)
        grad_output = torch.randn_like(output)
        expected = gradients(twin, x, grad_output, **case.call)
        reference = in_float64(layer, x, grad_output, **case.call)
        found = gradients(layer, x, grad_output, **case.call)
        assert_same_bits(found['output'], expected['output'])
        assert {value.dtype for value in found.values()} == {dtype}
        assert_near(found, reference, case, error=0.02)

    @every_case
    @in_turn(dtype=HALVES, input_dtype=['float32', 'autocast'])
    def test_autocast(self, case, dtype, input_dtype, device):
        layer = case.make(device)
        twin = exact_twin(layer)
        x = case.make_input(device)
        if input_dtype == 'autocast':
            x = x.to(dtype)

        def run(layer):
            leaf = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype):
                output = layer(leaf, **case.call)
            output.backward(torch.ones_like(output))
            grads = {key: p.grad for key, p in layer.named_parameters()}
            return dict(output=output.detach(), input=leaf.grad, **grads)

        expected, found = run(twin), run(layer)
        assert_same_bits(found['output'], expected['output'])
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value.dtype == expected[key].dtype
            if case.linear:
                # Against torch's half-precision gradients, not exact ones.
                assert relative_error(value, expected[key]) < WEIGHT_ERROR

    @every_class
    def test_float64(self, case, device):
        layer = case.make(device, dtype=torch.float64)
        x = case.make_input(device, torch.float64)
        with pytest.raises(TypeError, match='torch.float64'):
            layer(x)
        assert at_level(layer, 'L0')(x).dtype == torch.float64


class TestErrors:
    @staticmethod
    def of(run):
        """Type and text of the error that a call raises, or None."""
        try:
            run()
        except Exception as error:
            return type(error), str(error)
        return None

    @every_class
    @in_turn(
        size=[
            (),
            (4,),
            (3, 4),
            (3, 5),
            (1, 4),
            (2, 4, 0),
            (3, 4, 5),
            (3, 5, 5),
            (1, 4, 1),
            (1, 4, 1, 1),
            (2, 0, 4, 4),
            (3, 5, 9, 9),
            (1, 2, 1, 1),
            (2, 3, 5, 5, 5),
            (1, 2, 4, 5, 5, 5),
        ]
    )
    def test_wrong_input(self, case, size, device):
        layer = case.make(device)
        twin = exact_twin(layer)
        x = torch.randn(size, device=device, requires_grad=True)
        assert self.of(lambda: layer(x)) == self.of(lambda: twin(x))

    @every_class
    @in_turn([dict(dtype=torch.float64), dict(dtype=torch.int64)])
    def test_wrong_dtype(self, case, dtype, device):
        layer = case.make(device)
        twin = exact_twin(layer)
        x = case.make_input(device, dtype)
        expected = self.of(lambda: twin(x))
        if expected is not None:
            assert self.of(lambda: layer(x)) == expected

    @every({n: c for n, c in CASES.items() if n.endswith('output size')})
    def test_wrong_output_size(self, case, device):
        layer = case.make(device)
        twin = exact_twin(layer)
        x = case.make_input(device)
        for size in ([99] * (x.dim() - 2), [2], [5] * 6):
            expected = self.of(lambda s=size: twin(x, output_size=s))
            assert expected is not None
            found = self.of(lambda s=size: layer(x, output_size=s))
            assert found == expected

    @every_class
    @in_turn(
        kwargs=[
            dict(unknown=1),
            dict(groups=3),
            dict(groups=0),
            dict(padding='some'),
            dict(padding='same', stride=2),
            dict(padding_mode='unknown'),
            dict(padding_mode='reflect'),
            dict(num_groups=4),
        ]
    )
    def test_constructor(self, case, kwargs):
        parent = case.cls.torch_class()
        expected = self.of(lambda: parent(*case.args, **kwargs))
        found = self.of(lambda: case.cls(*case.args, **kwargs))
        if found is not None:
            # Some texts name the class of the layer.
            text = found[1].replace(case.cls.__name__, parent.__name__)
            found = found[0], text
        assert found == expected

    @every_class
    def test_too_few_arguments(self, case):
        def error(cls):
            return self.of(lambda: cls(*case.args[1:]))

        assert error(case.cls) == error(case.cls.torch_class())

    @every_class
    @in_turn(bits=[0, 9, 16, -1, 2.5, '2'])
    def test_unknown_bits(self, case, bits):
        with pytest.raises(ValueError, match=f'bits.*got {bits!r}'):
            case.cls(*case.args, bits=bits)

    @every_class
    @in_turn(group_size=[0, 100, 1024])
    def test_unknown_group_size(self, case, group_size):
        with pytest.raises(ValueError, match=f'group_size.*{group_size!r}'):
            case.cls(*case.args, group_size=group_size)


class TestWhatIsKept:
    @every_class
    def test_codes_by_closed_form(self, case, device):
        layer = case.make(device, bits=2)
        x = case.make_input(device).requires_grad_()
        own = {t.data_ptr() for t in layer.state_dict().values()}
        with saved_tensors() as saved:
            layer(x)
        codes = [t for t in saved if t.dtype == torch.uint8 and t.numel()]
        samples, elements = x.shape[0], x[0].numel()
        assert codes[0].nbytes == samples * math.ceil(elements / 8) * 2
        # Else there are ranges, and statistics of at most a number for each
        # channel of each sample.
        rest = sum(
            t.nbytes
            for t in saved
            if t is not codes[0] and t.data_ptr() not in own
        )
        ranges = samples * math.ceil(elements / 256) * 4
        assert ranges <= rest <= ranges + (0 if case.linear else 3 * 8 * 8)

    @every_case
    @in_turn(level=['L0', 'L2', 'L3'], autocast=[False, True])
    def test_meter(self, case, autocast, level, device):
        def run(layer):
            context = contextlib.nullcontext()
            if autocast:
                context = torch.autocast(device.type, torch.bfloat16)
            with context:
                layer(x, **case.call)

        x = case.make_input(device).requires_grad_()
        layer = case.make(device, bits=None)
        twin = exact_twin(layer)
        with saved_tensors() as saved:
            run(twin)
        own = {t.data_ptr() for t in twin.state_dict().values()}
        sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved}
        expected = sum(sizes[key] for key in sizes.keys() - own)
        at_level(layer, level)
        with measure_activations(layer) as meter:
            run(layer)
        assert meter.exact_bytes == pytest.approx(expected, rel=0.05)
        if level == 'L0':
            assert meter.saved_bytes == meter.exact_bytes
        else:
            assert 0 < meter.layers_saved_bytes <= meter.saved_bytes

    @every_class
    def test_nothing_needs_a_gradient(self, case, device, monkeypatch):
        packed = count_packs(monkeypatch)
        layer = case.make(device).requires_grad_(False)
        with saved_tensors() as saved:
            output = layer(case.make_input(device))
        assert not (saved or packed or output.requires_grad)

    @every({n: case for n, case in CLASSES.items() if case.linear})
    def test_frozen_weight_keeps_no_input(self, case, device, monkeypatch):
        packed = count_packs(monkeypatch)
        layer = case.make(device)
        layer.weight.requires_grad_(False)
        x = case.make_input(device)
        grad_output = torch.randn_like(layer(x))
        reference = in_float64(layer, x, grad_output)
        found = gradients(layer, x, grad_output)
        assert not packed
        assert found['weight'] is None
        for key in ('input', 'bias'):
            error = relative_error(found[key], reference[key])
            assert error < FLOAT32_ERROR


class TestModule:
    @every_class
    def test_class(self, case):
        parent = case.cls.torch_class()
        assert issubclass(case.cls, parent) and parent in case.cls.__bases__
        assert parent.__module__.startswith('torch.nn.')
        layer = case.cls(*case.args)
        assert layer.quantizer.bits == 2
        expected = parent(*case.args)
        assert list(layer.state_dict()) == list(expected.state_dict())
        assert 'bits=2' in repr(layer)
        assert 'exact' in repr(at_level(layer, 'L0'))

    @every_class
    def test_same_parameters_as_torch(self, case, seed):
        torch.manual_seed(seed)
        expected = case.cls.torch_class()(*case.args).state_dict()
        torch.manual_seed(seed)
        assert_same(case.cls(*case.args).state_dict(), expected)

    @every_class
    @in_turn(
        dict(
            copied=dict(duplicate=copy.deepcopy),
            pickled=dict(duplicate=lambda m: pickle.loads(pickle.dumps(m))),
        )
    )
    def test_duplicates(self, case, duplicate, device):
        layer = case.make(device)
        before = copy.deepcopy(layer.state_dict())
        twin = duplicate(layer)
        assert type(twin) is case.cls
        assert twin.quantizer is not layer.quantizer
        assert twin.quantizer.own == layer.quantizer.own
        x = case.make_input(device)
        expected = exact_twin(layer)(x)
        assert_same_bits(twin(x), expected)
        twin(x).sum().backward()
        assert layer.weight.grad is None
        assert_same(layer.state_dict(), before)


class TestFloat:
    @every_class
    def test_from_float(self, case, device):
        plain = case.cls.torch_class()(*case.args).to(device).eval()
        plain.weight.requires_grad_(False)
        attributes = copy.copy(vars(plain))
        layer = case.cls.from_float(plain, bits=4, group_size=64)
        assert type(layer) is case.cls and type(plain) is not case.cls
        assert vars(plain).keys() == attributes.keys()
        assert layer.quantizer.own == (4, 64)
        assert not layer.training and not layer.weight.requires_grad
        for name, tensor in plain.state_dict(keep_vars=True).items():
            assert layer.state_dict(keep_vars=True)[name] is tensor
        layer.train()
        assert not plain.training

    @every_class
    def test_to_float(self, case, device):
        layer = case.make(device)
        twin = layer.to_float()
        assert type(twin) is case.cls.torch_class()
        assert type(layer) is case.cls and layer.quantizer.bits == 8
        assert not hasattr(twin, 'quantizer')
        state = layer.state_dict(keep_vars=True)
        for name, tensor in twin.state_dict(keep_vars=True).items():
            assert tensor is state[name]
        x = case.make_input(device)
        assert_same_bits(copy.deepcopy(layer)(x), twin(x))

    @every_class
    def test_there_and_back(self, case, device):
        plain = case.cls.torch_class()(*case.args).to(device)
        back = case.cls.from_float(plain).to_float()
        assert type(back) is type(plain) and back is not plain
        assert vars(back).keys() == vars(plain).keys()

    @every_class
    def test_tables_are_its_own(self, case, device):
        plain = case.cls.torch_class()(*case.args).to(device)
        layer = case.cls.from_float(plain)
        weight = plain.weight
        layer.weight = nn.Parameter(weight.detach() + 1)
        layer.register_forward_hook(lambda *_: None)
        assert plain.weight is weight and not plain._forward_hooks

    @every_class
    def test_another_class(self, case):
        class Own(case.cls.torch_class()):
            pass

        for layer in (nn.Bilinear(1, 1, 1), Own(*case.args)):
            name = type(layer).__name__
            with pytest.raises(TypeError, match=f'from_float.*got {name}'):
                case.cls.from_float(layer)
        with pytest.raises(TypeError, match='got NoneType'):
            case.cls.from_float(None)

    @every_class
    def test_wrong_settings(self, case):
        plain = case.cls.torch_class()(*case.args)
        with pytest.raises(ValueError, match='bits.*got 9'):
            case.cls.from_float(plain, bits=9)
