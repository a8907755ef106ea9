"""Layers under tools that read along, and payloads that must not be stale."""

import copy
import functools
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.layers import count_packs
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mmactnn
from mmactnn import QConv2d, QLinear, QReLU, convert_model, revert_model
from mmactnn.codes.cache import PayloadCache
from mmactnn.registry import default_registry

ALONE = dict(base='L3', fuse=False)


def make_net():
    """Layers of all kinds, none of which is fused."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding='same'),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 8, 2, 2),
        nn.LeakyReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def make_pair(make=make_net, level=ALONE, training=True):
    """A model and its converted twin."""
    torch.manual_seed(0)
    plain = make().train(training)
    ours = copy.deepcopy(plain)
    convert_model(ours, level)
    return plain, ours


def images(*size):
    return torch.randn(size or (2, 3, 8, 8))


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class TestCalls:
    @pytest.mark.parametrize('level', ['L2', 'L3'])
    def test_few_of_the_package(self, level):
        """The host's time of a small convolution depends on its calls."""
        root = str(Path(mmactnn.__file__).parent)
        conv = nn.Sequential(nn.Conv2d(8, 8, 3))
        convert_model(conv, dict(base=level, fuse=False))
        conv(images(4, 8, 8, 8))
        for collecting in (True, False):
            x = images(4, 8, 8, 8).requires_grad_() * 1
            layer_bits = conv[0].quantizer.layer_bits
            if layer_bits is not None:
                layer_bits.precision.collecting = collecting
            found = []

            def count(frame, event, _, found=found):
                if event == 'call':
                    if frame.f_code.co_filename.startswith(root):
                        found.append(frame.f_code.co_name)

            sys.setprofile(count)
            try:
                conv[0](x)
            finally:
                sys.setprofile(None)
            assert len(found) <= 15, ' '.join(found)


class TestPatches:
    @pytest.mark.parametrize(
        ('cls', 'name', 'layer'),
        [
            (nn.Conv2d, 'forward', lambda: nn.Conv2d(3, 3, 1)),
            (nn.Conv2d, '_conv_forward', lambda: nn.Conv2d(3, 3, 1)),
            (nn.ReLU, 'forward', nn.ReLU),
            (nn.BatchNorm2d, 'forward', lambda: nn.BatchNorm2d(3)),
            (nn.Linear, 'forward', lambda: nn.Linear(8, 2)),
            (nn.MaxPool2d, 'forward', lambda: nn.MaxPool2d(2)),
        ],
    )
    def test_of_a_class(self, cls, name, layer, monkeypatch):
        (_, ours), x = make_pair(lambda: nn.Sequential(layer())), images()
        expected = ours.eval()(x)
        original = getattr(cls, name)
        monkeypatch.setattr(
            cls, name, lambda self, *args: original(self, *args) + 1
        )
        # Batch norm stays in eval mode, with the same statistics.
        ours.train(cls is not nn.BatchNorm2d)
        found = ours(x.requires_grad_())
        torch.testing.assert_close(found, expected + 1)

    def test_of_an_instance(self):
        _, ours = make_pair(lambda: nn.Sequential(nn.Conv2d(3, 3, 1)))
        ours[0]._conv_forward = types.MethodType(
            lambda self, x, weight, bias: F.conv2d(x, 2 * weight, bias),
            ours[0],
        )
        x = images()
        expected = F.conv2d(x, 2 * ours[0].weight, ours[0].bias)
        torch.testing.assert_close(ours(x), expected)

    def test_bound_methods_survive_a_revert(self):
        plain, ours = make_pair()
        runs = [
            functools.partial(checkpoint, layer.forward, use_reentrant=False)
            for layer in ours
        ]
        revert_model(ours)
        x, y = images(), None
        y = x
        for run in runs:
            y = run(y)
        torch.testing.assert_close(y, plain(x))


class TestTools:
    def test_evaluation(self):
        plain, ours = make_pair(training=False)
        x = images()
        jacobians = [
            torch.func.vmap(torch.func.jacrev(model))(x[:, None])
            for model in (plain, ours)
        ]
        assert_near(*jacobians[::-1])
        for trace in (
            lambda m: torch.jit.trace(m, x),
            lambda m: make_fx(m)(x),
            lambda m: torch.export.export(m, (x,)).module(),
            lambda m: torch.compile(m, backend='eager', fullgraph=True),
        ):
            assert_near(trace(ours)(x), plain(x))

    @pytest.mark.parametrize('level', ['L0', ALONE, 'L3'])
    def test_script_is_refused(self, level):
        _, ours = make_pair(level=level)
        with pytest.raises(RuntimeError, match='script mmactnn.revert_model'):
            torch.jit.script(ours)
        torch.jit.script(revert_model(ours))

    def test_transforms_in_training(self):
        plain, ours = make_pair(lambda: nn.Sequential(*list(make_net())[4:]))
        x = images(2, 8, 8, 8)
        tangents = [
            torch.func.jvp(model, (x,), (x,)) for model in (plain, ours)
        ]
        assert_near(tangents[1], tangents[0])

    @pytest.mark.parametrize('level', ['L0', ALONE])
    def test_symbolic_trace(self, level):
        plain, ours = make_pair(level=level)
        traced = torch.fx.symbolic_trace(nn.Sequential(ours))
        targets = [n for n in traced.graph.nodes if n.op == 'call_module']
        assert len(targets) == len(ours)
        x = images()
        torch.testing.assert_close(traced(x), plain(x))
        # A layer alone is what is traced, and no leaf of it.
        assert torch.fx.symbolic_trace(ours[4])(images(2, 8, 4, 4)).shape

    def test_counts_of_flops(self):
        counts = []
        for model in make_pair():
            with FlopCounterMode(display=False) as counter:
                model(images()).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]

    def test_meta_device(self):
        plain, ours = make_pair()
        ours.to('meta')(images().to('meta')).sum().backward()
        assert all(p.grad.is_meta for p in ours.parameters())

    def test_compile(self):
        torch._dynamo.reset()
        _, ours = make_pair()
        twin = copy.deepcopy(ours)
        compiled = torch.compile(ours, backend='aot_eager')
        x = images()
        for model in (compiled, twin):
            model(x).square().sum().backward()
        for found, expected in zip(ours.parameters(), twin.parameters()):
            assert_near(found.grad, expected.grad)

    def test_function_mode(self):
        class Doubled(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                return 2 * out if func is F.relu else out

        x = images().requires_grad_()
        with Doubled():
            assert torch.equal(QReLU()(x), 2 * x.relu())


class Scan(torch.Tensor):
    """All is torch's default for subclasses."""


class Spaced(torch.Tensor):
    """Metadata goes along."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, cls):
            seen = (a.spacing for a in args if isinstance(a, cls))
            out.spacing = next(seen, None)
        return out


class Picky(torch.Tensor):
    """Knows functions of torch, and no others."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', '').startswith('mmactnn'):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs or {})


class TestSubclasses:
    @pytest.mark.parametrize('cls', [Scan, Spaced, Picky])
    def test_trains(self, cls, monkeypatch):
        packed = count_packs(monkeypatch)
        layers = (
            nn.Conv2d(3, 8, 3),
            nn.LeakyReLU(0.1, True),
            nn.Conv2d(8, 2, 1),
        )
        plain, ours = make_pair(lambda: nn.Sequential(*layers))
        x = images().as_subclass(cls)
        x.spacing = 3
        outputs = []
        for model in (plain, ours):
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
        assert type(outputs[1]) is cls
        if cls is Spaced:
            assert outputs[1].spacing == 3
        assert bool(packed) == (cls is not Picky)
        torch.testing.assert_close(*outputs)
        for found, exact in zip(ours.parameters(), plain.parameters()):
            error = (found.grad - exact.grad).norm() / exact.grad.norm()
            assert error < 0.6

    def test_own_kernels(self):
        from torch.testing._internal.two_tensor import TwoTensor

        _, ours = make_pair(lambda: nn.Sequential(nn.ReLU()))
        x = images().requires_grad_()
        output = ours(TwoTensor(x, x))
        assert isinstance(output, TwoTensor)


class TestParameters:
    @pytest.mark.parametrize(
        'wrap',
        [
            nn.utils.weight_norm,
            parametrizations.weight_norm,
            parametrizations.orthogonal,
            nn.utils.spectral_norm,
            parametrizations.spectral_norm,
            lambda layer: prune.l1_unstructured(layer, 'weight', 0.3),
        ],
    )
    @pytest.mark.parametrize(
        'make', [lambda: nn.Conv2d(3, 3, 3), lambda: nn.Linear(8, 8)]
    )
    @pytest.mark.filterwarnings('ignore')
    def test_wrapped_after_conversion(self, make, wrap):
        plain, ours = make_pair(lambda: nn.Sequential(make()))
        for model in (plain, ours):
            torch.manual_seed(1)
            wrap(model[0])
        x = images()
        outputs = [model(x) for model in (plain, ours)]
        torch.testing.assert_close(*outputs)
        outputs[1].sum().backward()
        assert all(p.grad is not None for p in ours.parameters())
        revert_model(ours)
        torch.testing.assert_close(ours(x), plain(x))

    def test_parametrised_before_conversion(self):
        plain = parametrizations.weight_norm(nn.Linear(8, 8))
        layer, x = copy.deepcopy(plain), images().requires_grad_()
        quantizer = QLinear._make_quantizer(None, None)
        QLinear.convert_(layer, quantizer)
        assert isinstance(layer, QLinear)
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(copy.deepcopy(layer)(x), plain(x))
        assert layer.revert_() is nn.Linear
        torch.testing.assert_close(layer(x), plain(x))
        torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')
        assert type(layer) is nn.Linear

    def test_additions_of_a_subclass(self):
        layer = Named(3, 3, 1)
        QConv2d.convert_(layer, QConv2d._make_quantizer(None, None))
        for twin in (layer, pickle.loads(pickle.dumps(layer))):
            assert isinstance(twin, QConv2d) and twin.name() == 'named'
            assert twin(images()).requires_grad
            assert twin.revert_() is type(twin) is Named


class Named(nn.Conv2d):
    def name(self):
        return 'named'


EXAMPLES = {
    f'{layer.__name__}, {name}': example
    for layer, entry in default_registry.layers.items()
    if entry.examples is not None
    for name, example in entry.examples().items()
}


@pytest.mark.parametrize('name', EXAMPLES)
def test_every_example(name):
    """The output is the parent's, and so is the gradient in evaluation."""
    make, size = EXAMPLES[name]
    layer = make()
    plain = copy.deepcopy(layer)
    plain.revert_()
    x = torch.randn(size)
    # torch has no such layers, or none on a CPU.
    if not name.startswith(('QSync', 'QBatchNorm,')):
        found = [m.eval()(x.requires_grad_() * 1) for m in (layer, plain)]
        assert torch.equal(*found)
        assert type(found[0].grad_fn) is type(found[1].grad_fn)
    x = x.requires_grad_() * 1
    with mmactnn.measure_activations(layer.train()) as meter:
        layer(x).sum().backward()
    assert meter.layers_exact_bytes > 2 * meter.layers_saved_bytes


class TestPayloads:
    @pytest.mark.parametrize(
        'write',
        [
            lambda x: x.mul_(2),
            lambda x: x.detach().mul_(2),
            lambda x: x[0, 0].zero_(),
            lambda x: x.data.mul_(2),
            lambda x: x.data[0, 0, 0, :2].copy_(x.data[0, 0, 0, :2].flip(0)),
            lambda x: x.detach().numpy().__imul__(2),
        ],
    )
    def test_of_tensors_written_to(self, write, monkeypatch):
        packed = count_packs(monkeypatch)
        _, ours = make_pair(lambda: nn.Sequential(*[nn.Conv2d(3, 3, 1)] * 1))
        x = images().requires_grad_() * 1
        ours(x), ours(x)
        assert len(packed) == 1
        with torch.no_grad():
            write(x)
        ours(x)
        assert len(packed) == 2

    def test_go_with_their_tensors(self):
        _, ours = make_pair(lambda: nn.Sequential(nn.Conv2d(3, 3, 1)))
        cache = ours[0].quantizer.cache
        x = images().requires_grad_() * 1
        ours(x)
        assert len(cache._entries) == 1
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert not twin[0].quantizer.cache._entries
            assert twin[0].quantizer.cache is not cache
        del x
        assert not cache._entries

    def test_one_cache_for_a_model(self):
        _, ours = make_pair()
        for model in (ours, copy.deepcopy(ours)):
            caches = {
                layer.quantizer.cache
                for layer in model
                if hasattr(layer, 'quantizer')
            }
            assert len(caches) == 1
            assert isinstance(caches.pop(), PayloadCache)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))

    def forward(self, x):
        self.hidden = torch.tanh(self.first(x))
        return self.hidden + self.branch(self.hidden)


class TestSecondDerivatives:
    @pytest.mark.parametrize('what', ['first.weight', 'hidden'])
    def test_refused_with_respect_to_what_lies_before(self, what):
        _, model = make_pair(Residual)
        revert_model(model.first)
        output = model(images()).sum()
        asked = model.hidden if what == 'hidden' else model.first.weight
        (grad,) = torch.autograd.grad(output, asked, create_graph=True)
        with pytest.raises(RuntimeError, match='differentiated twice'):
            torch.autograd.grad(grad.sum(), asked)

    @pytest.mark.parametrize(
        'layer',
        [
            nn.ReLU(),
            nn.ReLU6(True),
            nn.LeakyReLU(0.2),
            nn.MaxPool2d(3, 2, 1),
            nn.MaxPool2d(2, dilation=2, ceil_mode=True),
            nn.AvgPool2d(3, 2, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(3, 3, 3).requires_grad_(False),
            nn.Linear(9, 3).requires_grad_(False),
        ],
        ids=str,
    )
    @pytest.mark.parametrize('last', [False, True])
    def test_exact_where_nothing_is_rounded(self, layer, last):
        format = torch.channels_last if last else torch.contiguous_format
        x = images(2, 3, 7, 9).contiguous(memory_format=format)
        pair = make_pair(lambda: nn.Sequential(nn.LogSigmoid(), layer))
        found = [self.derivatives(model, x) for model in pair]
        for ours, exact in zip(found[1], found[0]):
            assert_near(ours, exact)

    @staticmethod
    def derivatives(model, x):
        x = x.clone().requires_grad_()
        y = model(x).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        y = first.pow(3).sum()
        (second,) = torch.autograd.grad(y, x, create_graph=True)
        return first, second, *torch.autograd.grad(second.square().sum(), x)

    def test_batches_of_gradients(self):
        plain, ours = make_pair()
        x = images().requires_grad_()
        grads = torch.randn(3, 2, 4)
        found = [
            torch.autograd.grad(model(x), x, grads, is_grads_batched=True)[0]
            for model in (plain, ours)
        ]
        error = (found[1] - found[0]).norm() / found[0].norm()
        assert error < 0.6
        torch.manual_seed(0)
        output = ours(x)
        batch = torch.autograd.grad(
            output, x, grads, is_grads_batched=True, retain_graph=True
        )[0]
        for one, grad in zip(batch, grads):
            alone = torch.autograd.grad(output, x, grad, retain_graph=True)[0]
            torch.testing.assert_close(one, alone)
