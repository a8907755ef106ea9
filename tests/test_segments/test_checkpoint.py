"""Checkpointing from codes, against torch's and against exact gradients."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as exact_checkpoint

import mmactnn


def make_input(*size, dtype=torch.float32):
    """An input with a history, as that of a block."""
    leaf = torch.randn(size, dtype=dtype, requires_grad=True)
    return leaf, leaf * 1


class FeedForward(nn.Module):
    """Pre-norm feed-forward part of a transformer."""

    def __init__(self, act=nn.GELU, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.first = nn.Linear(64, 128)
        self.act = act()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(128, 64)

    def forward(self, x, scale=1.0):
        hidden = self.act(self.first(self.norm(x)))
        return x + scale * self.second(self.dropout(hidden))


def gradients(model, leaf, output):
    """Gradients of a loss, as one vector in float64."""
    tensors = [leaf, *model.parameters()]
    grads = torch.autograd.grad(output.float().square().sum(), tensors)
    return torch.cat([grad.double().flatten() for grad in grads])


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


def run(model, call, dtype=torch.float32, seed=0):
    """Output and gradients of a model by some kind of call."""
    torch.manual_seed(seed)
    leaf, x = make_input(4, 32, 64, dtype=dtype)
    output = call(model, x)
    return output, gradients(model, leaf, output)


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_gradients(dtype):
    torch.manual_seed(1)
    model = FeedForward().to(dtype)
    expected, exact = run(model, lambda m, x: m(x), dtype)
    output, found = run(model, mmactnn.checkpoint, dtype)
    assert torch.equal(output, expected)
    assert 0 < relative(found, exact) < 0.01
    _, coarse = run(
        model, functools.partial(mmactnn.checkpoint, bits=4), dtype
    )
    assert relative(coarse, exact) > 4 * relative(found, exact)


@pytest.mark.parametrize('act', [nn.GELU, nn.ReLU, nn.Hardswish, nn.ReLU6])
def test_bias(act):
    torch.manual_seed(1)
    model = FeedForward(act)
    _, exact = run(model, lambda m, x: m(x))
    draws = [run(model, mmactnn.checkpoint)[1] for _ in range(32)]
    error = sum(relative(draw, exact) for draw in draws) / 32
    mean = relative(sum(draws) / 32, exact)
    # Without a bias, the error of the mean is that of a draw over 32^0.5.
    assert mean**2 - error**2 / 32 < (0.1 * error) ** 2


def test_random_numbers():
    torch.manual_seed(1)
    model = FeedForward(dropout=0.5)
    expected, exact = run(model, lambda m, x: m(x))
    output, found = run(model, mmactnn.checkpoint)
    assert torch.equal(output, expected)
    assert relative(found, exact) < 0.01


def test_saved_bytes():
    model = FeedForward()
    _, x = make_input(4, 32, 64)
    with mmactnn.measure_activations(model) as meter:
        output = mmactnn.checkpoint(model, x)
    # 8 bits an element, and 32 of the range of 256.
    assert meter.saved_bytes == x.numel() * (1 + 4 / 256)
    assert meter.layers_saved_bytes == meter.saved_bytes
    with mmactnn.measure_activations(model) as plain:
        model(x)
    assert meter.exact_bytes == plain.saved_bytes
    output.sum().backward()


def test_masks_are_counted():
    model = FeedForward(nn.ReLU)
    _, x = make_input(4, 32, 64)
    with mmactnn.measure_activations(model) as meter:
        mmactnn.checkpoint(model, x).sum().backward()
    codes = x.numel() * (1 + 4 / 256)
    assert meter.saved_bytes == codes + 2 * x.numel() / 8


def test_input_is_released():
    model = FeedForward()
    leaf, x = make_input(4, 32, 64)
    storage = x.untyped_storage()
    pointer = torch.multiprocessing.reductions.StorageWeakRef(storage)
    output = mmactnn.checkpoint(model, x)
    del x, storage
    assert pointer.expired()
    output.sum().backward()
    assert leaf.grad is not None


def test_several_segments_share_codes():
    model = FeedForward()
    _, x = make_input(4, 32, 64)
    with mmactnn.measure_activations(model) as meter:
        for _ in range(3):
            mmactnn.checkpoint(model, x)
    assert meter.saved_bytes == x.numel() * (1 + 4 / 256)


def test_exact_inputs():
    """Leaves, small, integer and frozen tensors are not rounded."""
    seen = []

    def function(x, leaf, small, index, frozen, *, flags):
        seen.append((x, leaf, small, index, frozen, flags['mask']))
        return (x * leaf * small.sum()).sin()[index] * frozen

    leaf, x = make_input(64, 64)
    other = torch.randn(64, 64, requires_grad=True)
    small = torch.randn(5, requires_grad=True) * 2
    index = torch.arange(63, -1, -1)
    frozen, mask = torch.randn(64, 64), torch.rand(64, 64) > 0.5
    mmactnn.checkpoint(
        function, x, other, small, index, frozen, flags=dict(mask=mask)
    ).sum().backward()
    first, second = seen
    assert not torch.equal(first[0], second[0])
    assert (first[0] - second[0]).abs().max() < 0.04
    assert all(map(torch.equal, first[1:], second[1:]))
    assert leaf.grad.isfinite().all() and other.grad is not None


def test_inputs_in_containers():
    def function(pair, *, table):
        return pair[0] * pair[1].sigmoid() + table['x'].sin()

    leaf, x = make_input(4, 16, 64)
    with mmactnn.measure_activations(nn.Identity()) as meter:
        output = mmactnn.checkpoint(function, (x, x * 2), table=dict(x=x * 3))
    assert meter.saved_bytes == 3 * x.numel() * (1 + 4 / 256)
    output.sum().backward()
    exact = torch.autograd.grad(
        function((leaf, leaf * 2), table=dict(x=leaf * 3)).sum(), leaf
    )
    assert relative(leaf.grad.double(), exact[0].double()) < 0.04


@pytest.mark.parametrize('inplace', [False, True])
def test_input_is_overwritten(inplace):
    """A function with a side effect on its input: from before the effect."""
    weight = torch.randn(64, 64, requires_grad=True)

    def function(x):
        h = F.relu(x, inplace=inplace)
        return (h @ weight).sin(), x

    leaf, x = make_input(32, 64)
    output, same = mmactnn.checkpoint(function, x)
    assert same is x
    (output.sum() + same.sum()).backward()
    found = torch.cat([leaf.grad.flatten(), weight.grad.flatten()])
    leaf2 = leaf.detach().requires_grad_()
    output, same = function(leaf2 * 1)
    exact = torch.autograd.grad(output.sum() + same.sum(), [leaf2, weight])
    exact = torch.cat([grad.flatten() for grad in exact])
    assert relative(found.double(), exact.double()) < 0.06


def test_several_backward_passes():
    model = FeedForward(nn.ReLU)
    _, x = make_input(4, 32, 64)
    output = mmactnn.checkpoint(model, x)
    weight = model.first.weight
    first, second = (
        torch.autograd.grad(output.sum(), weight, retain_graph=True)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize('early_stop', [False, True])
@pytest.mark.parametrize('nesting', ['ours', 'outer', 'inner'])
def test_nesting(nesting, early_stop):
    torch.manual_seed(1)
    model = nn.Sequential(FeedForward(), FeedForward())
    plain = functools.partial(exact_checkpoint, use_reentrant=False)
    outer = plain if nesting == 'inner' else mmactnn.checkpoint
    inner = plain if nesting == 'outer' else mmactnn.checkpoint

    def nested(model, x):
        def function(x):
            return model[1](inner(model[0], x))

        return outer(function, x, early_stop=early_stop)

    expected, exact = run(model, lambda m, x: m(x))
    output, found = run(model, nested)
    assert torch.equal(output, expected)
    assert 0 < relative(found, exact) < 0.01


def test_autocast():
    torch.manual_seed(1)
    model = FeedForward()

    def call(function):
        def run(model, x):
            with torch.autocast('cpu', torch.bfloat16):
                return function(model, x)

        return run

    expected, exact = run(model, call(lambda m, x: m(x)))
    output, found = run(model, call(mmactnn.checkpoint))
    assert torch.equal(output, expected)
    assert relative(found, exact) < 0.01


@pytest.mark.parametrize('wrap', ['module', 'closure', 'method', 'partial'])
def test_statistics_are_updated_once(wrap):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU())
    twin = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU())
    twin.load_state_dict(model.state_dict())
    function = dict(
        module=model,
        closure=lambda x: model(x),
        method=model.forward,
        partial=functools.partial(model.forward),
    )[wrap]
    leaf, x = make_input(4, 8, 8, 8)
    mmactnn.checkpoint(function, x).square().sum().backward()
    twin(leaf).square().sum().backward()
    for buffer, expected in zip(model.buffers(), twin.buffers()):
        assert torch.equal(buffer, expected)
    found, exact = model[0].weight.grad, twin[0].weight.grad
    assert relative(found.double(), exact.double()) < 0.05


def test_options_of_torch():
    model = FeedForward()
    contexts = []

    class Context:
        def __enter__(self):
            contexts.append(self)

        def __exit__(self, *args):
            pass

    first, again = Context(), Context()
    _, x = make_input(4, 32, 64)
    mmactnn.checkpoint(
        model,
        x,
        scale=2.0,
        preserve_rng_state=False,
        determinism_check='none',
        context_fn=lambda: (first, again),
    ).sum().backward()
    assert contexts == [first, again]
    _, x = make_input(4, 32, 64)
    mmactnn.checkpoint(model, x, debug=True).sum().backward()


def test_errors():
    model = FeedForward()
    _, x = make_input(4, 32, 64)
    with pytest.raises(ValueError, match='use_reentrant must be False'):
        mmactnn.checkpoint(model, x, use_reentrant=True)
    with pytest.raises(ValueError, match='9'):
        mmactnn.checkpoint(model, x, bits=9)
    with pytest.raises(ValueError, match='100'):
        mmactnn.checkpoint(model, x, group_size=100)


def test_without_gradients():
    model = FeedForward()
    _, x = make_input(4, 32, 64)
    with torch.no_grad():
        assert torch.equal(mmactnn.checkpoint(model, x), model(x))
    assert mmactnn.checkpoint(lambda: 3) == 3


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite_stay_visible(value):
    model = FeedForward()
    leaf, x = make_input(4, 32, 64)
    x = x + torch.zeros(64).index_fill(0, torch.tensor([3]), value)
    mmactnn.checkpoint(model, x).sum().backward()
    assert not model.first.weight.grad.isfinite().all()


def test_empty_and_strided():
    model = FeedForward()
    _, x = make_input(0, 32, 64)
    mmactnn.checkpoint(model, x).sum().backward()
    leaf = torch.randn(64, 32, 4, requires_grad=True)
    x = (leaf * 1).permute(2, 1, 0)[::2]
    strides = []

    def function(x):
        strides.append(x.stride())
        return model(x)

    mmactnn.checkpoint(function, x).sum().backward()
    assert len(strides) == 2
    assert leaf.grad.abs().sum() > 0
