"""QReLU against torch's ReLU."""

import copy
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
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import QReLU

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
    return special_values(torch.randn(size, device=device).to(dtype))


def make_grad(x):
    """A gradient with NaN, inf and zeros among both halves of the mask."""
    grad = torch.randn_like(x, memory_format=torch.contiguous_format)
    return special_values(grad.flatten()).flip(0).view(x.shape)


def assert_same(found, expected):
    # Equal but for the sign of zeros, which torch's devices treat
    # differently; gradients have to agree in that, too.
    torch.testing.assert_close(
        found['output'], expected['output'], rtol=0, atol=0, equal_nan=True
    )
    assert_same_bits(found['input'], expected['input'])


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
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    @pytest.mark.parametrize('size', SIZES, ids=str)
    @pytest.mark.parametrize('inplace', [False, True])
    def test_dtypes_and_sizes(self, inplace, size, dtype, device):
        x = make_input(device, size, dtype)
        grad_output = make_grad(x)
        expected = through(nn.ReLU(inplace), x, grad_output)
        found = through(QReLU(inplace), x, grad_output)
        assert_same(found, expected)

    @pytest.mark.parametrize('inplace', [False, True])
    @pytest.mark.parametrize('grad_layout', LAYOUTS)
    @pytest.mark.parametrize('layout', LAYOUTS)
    def test_layouts(self, layout, grad_layout, inplace, device):
        x = LAYOUTS[layout](make_input(device))
        grad_output = LAYOUTS[grad_layout](make_grad(x))
        expected = through(nn.ReLU(inplace), x, grad_output)
        found = through(QReLU(inplace), x, grad_output)
        assert_same(found, expected)
        assert found['output'].stride() == expected['output'].stride()

    @pytest.mark.parametrize('inplace', [False, True])
    def test_part_of_a_tensor(self, inplace, device):
        # A view whose base goes on to be used: torch, too, writes through.
        def run(relu):
            leaf = torch.linspace(-2, 2, 96, device=device)
            leaf = leaf.view(2, 4, 3, 4).requires_grad_()
            whole = leaf * 1
            output = relu(whole[:, 1:3])
            (whole.sum() + (output**2).sum()).backward()
            return dict(output=whole.detach(), input=leaf.grad)

        assert_same(run(QReLU(inplace)), run(nn.ReLU(inplace)))

    @pytest.mark.parametrize('inplace', [False, True])
    def test_exact_level(self, inplace, device):
        relu = at_level(nn.ReLU(inplace), 'L0')
        assert type(relu) is QReLU and relu.quantizer.exact
        x = make_input(device)
        grad_output = make_grad(x)
        expected = through(nn.ReLU(inplace), x, grad_output)
        found = through(relu, x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_same_bits(found['input'], expected['input'])

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
    def test_autocast(self, dtype, device):
        x = make_input(device)
        conv = nn.Conv2d(5, 4, 1, device=device)

        def run(relu):
            leaf = torch.nan_to_num(x).requires_grad_()
            with torch.autocast(device.type, dtype):
                output = relu(conv(leaf))
            output.backward(torch.ones_like(output))
            return dict(output=output.detach(), input=leaf.grad)

        expected = run(nn.ReLU())
        assert expected['output'].dtype == dtype
        assert_same(run(QReLU()), expected)


class TestWhatIsKept:
    @pytest.mark.parametrize('inplace', [False, True])
    @pytest.mark.parametrize('size', [(2, 3, 5, 7), (2, 4, 8, 8)])
    def test_one_bit_an_element(self, size, inplace, device):
        x = torch.randn(size, device=device, requires_grad=True) * 1
        with saved_tensors() as saved:
            QReLU(inplace)(x)
        assert [t.dtype for t in saved] == [torch.uint8]
        assert saved[0].nbytes == math.ceil(x.numel() / 8)

    @pytest.mark.parametrize('inplace', [False, True])
    def test_eval_is_the_parent(self, inplace, device):
        x = make_input(device)
        relu = QReLU(inplace).eval()
        grad_output = make_grad(x)
        with saved_tensors() as saved:
            found = through(relu, x, grad_output)
        assert [t.dtype for t in saved] == [torch.float32]
        expected = through(nn.ReLU(inplace), x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_same_bits(found['input'], expected['input'])

    def test_without_grad(self, device, monkeypatch):
        packed = count_packs(monkeypatch)
        x = make_input(device)
        with saved_tensors() as saved:
            output = QReLU()(x)
        assert not saved and not packed and not output.requires_grad
        x.requires_grad_()
        with torch.no_grad():
            assert_same_bits(QReLU()(x), nn.ReLU()(x))

    def test_integers(self, device):
        # They never need a gradient.
        x = torch.arange(-3, 4, device=device)
        assert torch.equal(QReLU()(x), torch.relu(x))

    def test_float64(self, device):
        x = make_input(device, dtype=torch.float64).requires_grad_()
        with pytest.raises(TypeError, match='torch.float64'):
            QReLU()(x)


class TestAutograd:
    def test_accumulation(self, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        relu = QReLU()
        for _ in range(3):
            relu(leaf).sum().backward()
        assert torch.equal(leaf.grad, 3 * (leaf > 0).float())

    @pytest.mark.parametrize('inplace', [False, True])
    def test_retain_graph(self, inplace, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        output = QReLU(inplace)(leaf * 1)
        grad_output = torch.randn_like(output)
        for _ in range(2):
            (grad,) = torch.autograd.grad(
                output, leaf, grad_output, retain_graph=True
            )
            assert torch.equal(grad, grad_output * (leaf > 0))

    @pytest.mark.parametrize('inplace', [False, True])
    @pytest.mark.parametrize('use_reentrant', [False, True])
    def test_checkpoint(self, use_reentrant, inplace, device):
        def run(relu):
            leaf = torch.linspace(-1, 1, 63, device=device).requires_grad_()
            # Keeps its input, so that its output may be overwritten.
            block = nn.Sequential(nn.SiLU(), relu)
            output = checkpoint(block, leaf, use_reentrant=use_reentrant)
            (output**2).sum().backward()
            return leaf.grad

        assert_same_bits(run(QReLU(inplace)), run(nn.ReLU(inplace)))

    def test_double_backward(self, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(
            QReLU()(leaf).square().sum(), leaf, create_graph=True
        )
        assert torch.equal(grad, 2 * leaf.relu())
        with pytest.raises(RuntimeError, match='QReLU.*twice'):
            grad.sum().backward()

    def test_in_place_on_a_leaf(self, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        for relu in (nn.ReLU(True), QReLU(True)):
            with pytest.raises(RuntimeError, match='leaf Variable'):
                relu(leaf)

    def test_in_place_on_what_another_node_saved(self, device):
        # exp keeps its output: overwriting it must not go unnoticed.
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        output = QReLU(inplace=True)(leaf.exp())
        with pytest.raises(RuntimeError, match='inplace operation'):
            output.sum().backward()


class TestModule:
    @pytest.mark.parametrize(
        'duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_duplicates(self, duplicate, device):
        twin = duplicate(QReLU(inplace=True))
        assert type(twin) is QReLU and twin.inplace
        x = torch.randn(4, 7, device=device)
        expected = gradients(nn.ReLU(), x, torch.ones_like(x))
        twin.inplace = False
        found = gradients(twin, x, torch.ones_like(x))
        assert_same(found, expected)

    def test_repr(self):
        assert 'inplace' in repr(QReLU(inplace=True))

    def test_errors_of_the_constructor(self):
        with pytest.raises(TypeError, match='unknown'):
            QReLU(unknown=1)


def test_inplace_on_a_leaf_is_refused_before_it_is_written(device):
    x = torch.tensor([-1.0, 1.0], device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match='leaf Variable'):
        QReLU(inplace=True)(x)
    assert x.tolist() == [-1.0, 1.0]
