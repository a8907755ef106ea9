"""QReLU, QReLU6 and QLeakyReLU against torch's layers."""

import copy
import functools
import math
import pickle

import pytest
import torch
from support.layers import (
    assert_same_bits,
    at_level,
    count_packs,
    gradients,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import QLeakyReLU, QReLU, QReLU6

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((), (1,), (7,), (0, 4, 8, 8), (3, 17), (3, 5, 9, 11), (2, 2, 2, 2, 3))


def special_values(tensor):
    """Overwrite the first values by those that need care."""
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, -1e-7]
    flat = tensor.view(-1)
    count = min(len(values), flat.numel())
    flat[:count] = torch.tensor(values[:count]).to(flat)
    return tensor


def make_input(device, size=(3, 5, 9, 11), dtype=torch.float32):
    # Values on both sides of the cap of ReLU6.
    return special_values(4 * torch.randn(size, device=device).to(dtype))


def make_grad(x):
    """A gradient with NaN, inf and zeros among both halves of the mask."""
    grad = torch.randn_like(x, memory_format=torch.contiguous_format)
    return special_values(grad.flatten()).flip(0).view(x.shape)


class Pair:
    """A compressed activation, and torch's of the same arguments."""

    def __init__(self, ours, theirs, **arguments):
        self.ours = functools.partial(ours, **arguments)
        self.theirs = functools.partial(theirs, **arguments)

    def assert_same(self, found, expected):
        # Equal but for the sign of zeros, which torch's devices treat
        # differently; gradients have to agree in that, too.
        torch.testing.assert_close(
            found['output'],
            expected['output'],
            rtol=0,
            atol=0,
            equal_nan=True,
        )
        counts = torch.ones_like(expected['input'], dtype=torch.bool)
        if self.ours.func is QReLU6:
            # On CPU torch lets the gradient of NaN pass, or not, by its place.
            counts = ~expected['output'].isnan()
        assert_same_bits(found['input'][counts], expected['input'][counts])


PAIRS = {
    'ReLU': Pair(QReLU, nn.ReLU),
    'ReLU6': Pair(QReLU6, nn.ReLU6),
    'LeakyReLU': Pair(QLeakyReLU, nn.LeakyReLU, negative_slope=0.1),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def gaps(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    'gaps': gaps,
    'part': lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


def through(relu, x, grad_output):
    """Gradients of a ReLU amid a graph, so that it may work in place."""
    leaf = x.detach().requires_grad_()
    # Keeps strides: gaps come from slicing a larger intermediate.
    inner = torch.empty_strided(
        x.shape, x.stride(), dtype=x.dtype, device=x.device
    )
    inner = inner.copy_(leaf)
    assert inner.stride() == x.stride()
    output = relu(inner)
    assert (output is inner) == relu.inplace
    output.backward(grad_output)
    return dict(output=output.detach(), input=leaf.grad)


class TestAgainstTorch:
    @in_turn(inplace=[False, True], size=SIZES, dtype=DTYPES)
    def test_dtypes_and_sizes(self, inplace, size, dtype, pair, device):
        x = make_input(device, size, dtype)
        grad_output = make_grad(x)
        expected = through(pair.theirs(inplace=inplace), x, grad_output)
        found = through(pair.ours(inplace=inplace), x, grad_output)
        pair.assert_same(found, expected)

    @in_turn(
        layout=tuple(LAYOUTS),
        grad_layout=tuple(LAYOUTS),
        inplace=[False, True],
    )
    def test_layouts(self, layout, grad_layout, inplace, pair, device):
        x = LAYOUTS[layout](make_input(device))
        grad_output = LAYOUTS[grad_layout](make_grad(x))
        expected = through(pair.theirs(inplace=inplace), x, grad_output)
        found = through(pair.ours(inplace=inplace), x, grad_output)
        pair.assert_same(found, expected)
        assert found['output'].stride() == expected['output'].stride()

    @in_turn(inplace=[False, True])
    def test_part_of_a_tensor(self, inplace, pair, device):
        # A view whose base goes on to be used: torch, too, writes through.
        def run(relu):
            leaf = torch.linspace(-2, 2, 96, device=device)
            leaf = leaf.view(2, 4, 3, 4).requires_grad_()
            whole = leaf * 1
            output = relu(whole[:, 1:3])
            (whole.sum() + (output**2).sum()).backward()
            return dict(output=whole.detach(), input=leaf.grad)

        pair.assert_same(
            run(pair.ours(inplace=inplace)), run(pair.theirs(inplace=inplace))
        )

    @in_turn(inplace=[False, True])
    def test_exact_level(self, inplace, pair, device):
        relu = at_level(pair.theirs(inplace=inplace), 'L0')
        assert type(relu) is pair.ours.func and relu.quantizer.exact
        x = make_input(device)
        grad_output = make_grad(x)
        expected = through(pair.theirs(inplace=inplace), x, grad_output)
        found = through(relu, x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_same_bits(found['input'], expected['input'])

    @in_turn(dtype=[torch.float16, torch.bfloat16])
    def test_autocast(self, dtype, pair, device):
        x = make_input(device)
        conv = nn.Conv2d(5, 4, 1, device=device)

        def run(relu):
            leaf = torch.nan_to_num(x).requires_grad_()
            with torch.autocast(device.type, dtype):
                output = relu(conv(leaf))
            output.backward(torch.ones_like(output))
            return dict(output=output.detach(), input=leaf.grad)

        expected = run(pair.theirs())
        assert expected['output'].dtype == dtype
        found = run(pair.ours())
        assert torch.equal(found['output'], expected['output'])
        assert_same_bits(found['input'], expected['input'])


class TestWhatIsKept:
    @in_turn(size=[(2, 3, 5, 7), (2, 4, 8, 8)], inplace=[False, True])
    def test_one_bit_an_element(self, size, inplace, pair, device):
        x = torch.randn(size, device=device, requires_grad=True) * 1
        with saved_tensors() as saved:
            pair.ours(inplace=inplace)(x)
        assert [t.dtype for t in saved] == [torch.uint8]
        assert saved[0].nbytes == math.ceil(x.numel() / 8)

    @in_turn(inplace=[False, True])
    def test_eval_is_the_parent(self, inplace, pair, device):
        x = make_input(device)
        relu = pair.ours(inplace=inplace).eval()
        grad_output = make_grad(x)
        with saved_tensors() as saved:
            found = through(relu, x, grad_output)
        assert [t.dtype for t in saved] == [torch.float32]
        expected = through(pair.theirs(inplace=inplace), x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_same_bits(found['input'], expected['input'])

    def test_without_grad(self, pair, device, monkeypatch):
        packed = count_packs(monkeypatch)
        x = make_input(device)
        with saved_tensors() as saved:
            output = pair.ours()(x)
        assert not saved and not packed and not output.requires_grad
        x.requires_grad_()
        with torch.no_grad():
            assert_same_bits(pair.ours()(x), pair.theirs()(x))

    def test_integers(self, device):
        # They never need a gradient.
        x = torch.arange(-3, 4, device=device)
        assert torch.equal(QReLU()(x), torch.relu(x))

    def test_float64(self, pair, device):
        x = make_input(device, dtype=torch.float64).requires_grad_()
        with pytest.raises(TypeError, match='torch.float64'):
            pair.ours()(x)


class TestAutograd:
    def test_accumulation(self, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        relu = QReLU()
        for _ in range(3):
            relu(leaf).sum().backward()
        assert torch.equal(leaf.grad, 3 * (leaf > 0).float())

    @in_turn(inplace=[False, True])
    def test_retain_graph(self, inplace, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        output = QReLU(inplace)(leaf * 1)
        grad_output = torch.randn_like(output)
        for _ in range(2):
            (grad,) = torch.autograd.grad(
                output, leaf, grad_output, retain_graph=True
            )
            assert torch.equal(grad, grad_output * (leaf > 0))

    @in_turn(use_reentrant=[False, True], inplace=[False, True])
    def test_checkpoint(self, use_reentrant, inplace, pair, device):
        def run(relu):
            leaf = torch.linspace(-1, 1, 63, device=device).requires_grad_()
            # Keeps its input, so that its output may be overwritten.
            block = nn.Sequential(nn.SiLU(), relu)
            output = checkpoint(block, leaf, use_reentrant=use_reentrant)
            (output**2).sum().backward()
            return leaf.grad

        found = run(pair.ours(inplace=inplace))
        assert_same_bits(found, run(pair.theirs(inplace=inplace)))

    def test_double_backward(self, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(
            QReLU()(leaf).square().sum(), leaf, create_graph=True
        )
        assert torch.equal(grad, 2 * leaf.relu())
        # The mask is exact.
        grad.sum().backward()
        assert torch.equal(leaf.grad, 2.0 * (leaf > 0))

    def test_in_place_on_a_leaf(self, pair, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        before = leaf.tolist()
        for make in (pair.theirs, pair.ours):
            with pytest.raises(RuntimeError, match='leaf Variable'):
                make(inplace=True)(leaf)
            # torch refuses before it writes.
            assert leaf.tolist() == before

    def test_negative_slope(self, device):
        pair = Pair(QLeakyReLU, nn.LeakyReLU, negative_slope=-0.5)
        x = make_input(device)
        grad_output = make_grad(x)
        expected = through(pair.theirs(), x, grad_output)
        pair.assert_same(through(pair.ours(), x, grad_output), expected)
        for make in (pair.theirs, pair.ours):
            with pytest.raises(RuntimeError, match='negative slope'):
                through(make(inplace=True), x, grad_output)

    def test_in_place_on_what_another_node_saved(self, device):
        # exp keeps its output: overwriting it must not go unnoticed.
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        output = QReLU(inplace=True)(leaf.exp())
        with pytest.raises(RuntimeError, match='inplace operation'):
            output.sum().backward()


class TestModule:
    @in_turn(
        duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_duplicates(self, duplicate, pair, device):
        twin = duplicate(pair.ours(inplace=True))
        assert type(twin) is pair.ours.func and twin.inplace
        x = torch.randn(4, 7, device=device)
        expected = gradients(pair.theirs(), x, torch.ones_like(x))
        twin.inplace = False
        found = gradients(twin, x, torch.ones_like(x))
        pair.assert_same(found, expected)

    def test_repr(self, pair):
        text = repr(pair.ours(inplace=True))
        assert 'inplace' in text and 'bits=1' in text

    def test_errors_of_the_constructor(self, pair):
        with pytest.raises(TypeError, match='unknown'):
            pair.ours(unknown=1)
