"""The meter against a count by hooks of the test's own."""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
from support.pairs import in_turn
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mmactnn import convert_model, measure_activations
from mmactnn.memory.meter import MIB


def count_saved_bytes(model, run):
    """Bytes of storages that a forward pass keeps, parameters aside.

    Holds on to all that is saved, so that no address is used twice.
    """
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = run(model)
    del output
    own = {
        t.untyped_storage().data_ptr()
        for t in (*model.parameters(), *model.buffers())
    }
    sizes = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in saved
    }
    return sum(size for key, size in sizes.items() if key not in own)


def measure(model, run):
    with measure_activations(model) as meter:
        run(model)
    return meter


def block(channels, inplace=True, bias=False):
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace),
    )


class Plain(nn.Module):
    """Convolution, normalisation and activation, one after the other."""

    def __init__(self, inplace=True):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), block(8, inplace), block(8, inplace)
        )

    def forward(self, x):
        return self.layers(x)


class Shared(nn.Module):
    """One tensor read by many layers, one layer reading many tensors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), block(8))
        self.one = nn.Conv2d(8, 8, 1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = block(8, bias=True)

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(self.two(self.one(x)) + self.shortcut(x))
        small = x[..., ::2, ::2]
        return self.head(x).mean() + self.head(small).mean()


class Mixed(nn.Module):
    """Layers that are not compressed among those that are."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Softshrink(), block(8), nn.MaxPool2d(2)
        )
        self.norm = nn.GroupNorm(2, 8)
        self.frozen = block(8).requires_grad_(False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.frozen(self.norm(self.body(x)))
        return self.head(x.mean((2, 3))).softmax(-1)


class Exact(nn.Module):
    """Layers that keep less, or nothing, and lose nothing."""

    def __init__(self, inplace=True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU6(inplace),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.1, inplace),
            nn.Dropout(0.2, inplace),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(8, 8, 3),
            nn.Dropout2d(0.2),
            nn.MaxPool2d(5, stride=1),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.head(self.body(x))


class Frozen(nn.Module):
    """As a detector's backbone: frozen stages, norms in eval mode."""

    def __init__(self):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3), block(8))
        self.stage2 = block(8)
        self.stage1.requires_grad_(False)

    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self.stage2(self.stage1(x))


class Checkpointed(nn.Module):
    """Some blocks are recomputed in the backward pass."""

    def __init__(self, use_reentrant, frozen=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), block(8))
        self.inner = nn.Sequential(block(8), block(8))
        if frozen:
            self.inner.requires_grad_(False)
        self.head = block(8)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = checkpoint(
            self.inner, self.stem(x), use_reentrant=self.use_reentrant
        )
        return self.head(x)


MODELS = {
    'plain': Plain,
    'not in place': functools.partial(Plain, inplace=False),
    'shared': Shared,
    'mixed': Mixed,
    'exact': Exact,
    'exact, not in place': functools.partial(Exact, inplace=False),
    'frozen': Frozen,
    'checkpoint': functools.partial(Checkpointed, False),
    'reentrant checkpoint': functools.partial(Checkpointed, True),
    'frozen checkpoint': functools.partial(Checkpointed, False, frozen=True),
}


@pytest.fixture(params=[None, torch.bfloat16], ids=['float32', 'autocast'])
def autocast_dtype(request):
    """Dtype of autocast; None for none."""
    return request.param


@pytest.fixture
def run(autocast_dtype, device):
    """Runs a model forward, under autocast or not."""
    x = torch.randn(4, 3, 34, 34, device=device)

    def forward(model):
        context = contextlib.nullcontext()
        if autocast_dtype is not None:
            context = torch.autocast(device.type, autocast_dtype)
        with context:
            return model(x)

    return forward


@pytest.mark.parametrize('name', MODELS)
@in_turn(level=[None, 'L0', 'L1', 'L2', 'L3'])
def test_bytes(name, level, run, device):
    """Tensors that are saved, and those that the stock model saves."""
    model = MODELS[name]().to(device)
    stock = counted = count_saved_bytes(model, run)
    if level is not None:
        convert_model(model, level)
        counted = count_saved_bytes(model, run)
    assert counted > 0
    meter = measure(model, run)
    assert meter.saved_bytes == pytest.approx(counted, rel=0.02)
    assert meter.exact_bytes == pytest.approx(stock, rel=0.02)
    assert meter.saved_mib == meter.saved_bytes / MIB
    assert meter.ratio == meter.exact_bytes / meter.saved_bytes


@in_turn(name=['plain', 'not in place', 'shared'])
def test_ratio_of_the_compressed_layers(name, run, autocast_dtype, device):
    model = MODELS[name]().to(device)
    exact = count_saved_bytes(model, run)
    convert_model(model, 'L3')
    meter = measure(model, run)
    # Nothing in these models but compressed layers keeps anything.
    assert meter.layers_exact_bytes == pytest.approx(exact, rel=0.02)
    assert meter.layers_saved_bytes == pytest.approx(
        count_saved_bytes(model, run), rel=0.02
    )
    if autocast_dtype is None:
        assert meter.layers_ratio >= 8


def test_codes_by_closed_form(device):
    # 4 * 8 * 32 * 32 elements: whole groups of 256.
    numel = 4 * 8 * 32 * 32
    model = block(8).to(device)
    convert_model(model, dict(base='L2', conv=2, norm=2, fuse=False))
    x = torch.randn(4, 8, 32, 32, device=device)
    meter = measure(model, lambda m: m(x))
    codes = numel * 2 / 8 + numel / 256 * 4
    assert meter.layers_saved_bytes == 2 * codes + numel / 8
    # Inputs of convolution and normalisation, output of the activation;
    # two numbers a channel of the normalisation's statistics.
    assert meter.layers_exact_bytes == pytest.approx(
        3 * numel * 4 + 2 * 8 * 4, abs=2048
    )


def test_without_compressed_layers(device):
    model = nn.Sequential(nn.Linear(8, 8), nn.Softshrink()).to(device)
    x = torch.randn(16, 8, device=device)
    meter = measure(model, lambda m: m(x))
    # Inputs of both layers.
    assert meter.saved_bytes == meter.exact_bytes == 2 * 16 * 8 * 4
    assert meter.ratio == meter.layers_ratio == 1
    assert meter.layers_saved_bytes == meter.layers_exact_bytes == 0


def test_nothing_runs():
    model = Plain()
    convert_model(model)
    meter = measure(model, lambda m: None)
    assert meter.saved_bytes == meter.exact_bytes == 0
    assert meter.ratio == 1


def test_eval_and_no_grad_keep_nothing(device):
    model = Plain().to(device)
    convert_model(model)
    x = torch.randn(2, 3, 12, 12, device=device)
    with torch.no_grad():
        meter = measure(model, lambda m: m(x))
    assert meter.saved_bytes == meter.exact_bytes == 0


def test_several_passes_add_up(device):
    model = Plain().to(device)
    convert_model(model)
    xs = [torch.randn(2, 3, 12, 12, device=device) for _ in range(3)]
    once = measure(model, lambda m: m(xs[0]))
    outputs = []
    thrice = measure(model, lambda m: outputs.extend(m(x) for x in xs))
    assert thrice.saved_bytes == 3 * once.saved_bytes
    # But a tensor that all of them read counts once.
    same = measure(model, lambda m: outputs.extend(m(xs[0]) for _ in range(3)))
    assert same.exact_bytes == 3 * once.exact_bytes - 2 * xs[0].nbytes


@pytest.mark.parametrize('name', ['plain', 'checkpoint'])
def test_backward_does_not_count(name, device):
    model = MODELS[name]().to(device)
    convert_model(model)
    x = torch.randn(2, 3, 12, 12, device=device)
    forward = measure(model, lambda m: m(x))
    whole = measure(model, lambda m: m(x).sum().backward())
    for key in ('saved_bytes', 'exact_bytes', 'layers_exact_bytes'):
        # A loss's shape is all that sum() keeps.
        assert getattr(whole, key) == getattr(forward, key)


@pytest.mark.parametrize('name', MODELS)
@in_turn(level=[None, 'L0', 'L3'])
def test_places_add_up(name, level, device):
    model = MODELS[name]().to(device)
    if level is not None:
        convert_model(model, level)
    x = torch.randn(2, 3, 34, 34, device=device)
    # Every call is a place of its own.
    with measure_activations(model, itertools.count().__next__) as meter:
        model(x)
    places = meter.by_place()
    assert len(places) > 1
    assert sum(c.exact for c in places.values()) == meter.exact_bytes
    assert sum(c.saved for c in places.values()) == meter.saved_bytes
    compressed = [c for (_, is_ours), c in places.items() if is_ours]
    assert sum(c.saved for c in compressed) == meter.layers_saved_bytes


def test_first_place_counts(device):
    x = torch.randn(8, 8, device=device, requires_grad=True)
    places = iter('abc')
    with measure_activations(nn.Identity(), lambda: next(places)) as meter:
        y = x.exp()
        z = y.square() + y[:4].sin().sum()
    del y, z
    assert meter.by_place() == {('a', False): (x.nbytes, x.nbytes)}


def test_one_place_without_a_locator(device):
    x = torch.randn(8, 8, device=device, requires_grad=True)
    with measure_activations(nn.Identity()) as meter:
        x.exp()
    assert meter.by_place() == {(None, False): (x.nbytes, x.nbytes)}


def test_nothing_changes(device):
    """Measured and unmeasured passes give the same gradients."""
    model = Shared().to(device)
    convert_model(model, 'L3')
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 12, 12, device=device)
    with measure_activations(model):
        model(x).backward()
    twin(x).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_meter_is_taken_off(device):
    model = Plain().to(device)
    convert_model(model)
    with pytest.raises(RuntimeError, match='stop'):
        with measure_activations(model) as meter:
            raise RuntimeError('stop')
    model(torch.randn(2, 3, 12, 12, device=device))
    assert meter.saved_bytes == meter.exact_bytes == 0


def test_no_memory_is_held(device):
    """Counted tensors are freed together with the graph."""
    model = Plain().to(device)
    convert_model(model, 'L0')
    x = torch.randn(2, 3, 12, 12, device=device)
    with measure_activations(model) as meter:
        output = model(x)
        saved = meter.saved_bytes
        # The last activation keeps it.
        storage = StorageWeakRef(output.untyped_storage())
        assert not storage.expired()
        del output
        assert storage.expired()
        # Storages of a second pass are new ones, wherever they lie.
        model(x)
    assert meter.saved_bytes == 2 * saved - x.nbytes
