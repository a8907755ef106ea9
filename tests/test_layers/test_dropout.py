"""QDropout against what torch's dropout promises."""

import copy
import math
import pickle

import pytest
import torch
from mmcv.cnn.bricks.drop import Dropout as MMCVDropout
from support.layers import (
    assert_same_bits,
    at_level,
    gradients,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import QDropout, QDropout2d, convert_model, revert_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (1,), (7,), (0, 4), (3, 5, 9, 11))
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    'gaps': lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}


def through(dropout, x, grad_output=None):
    """A pass amid a graph, so that the layer may work in place."""
    leaf = x.detach().requires_grad_()
    inner = torch.empty_strided(
        x.shape, x.stride(), dtype=x.dtype, device=x.device
    )
    inner = inner.copy_(leaf)
    output = dropout(inner)
    assert (output is inner) == dropout.inplace
    if grad_output is None:
        grad_output = torch.ones_like(output)
    output.backward(grad_output)
    return output.detach(), leaf.grad


class TestForwardAndBackward:
    @in_turn(inplace=[False, True], shape=SHAPES, dtype=DTYPES)
    def test_one_mask(self, inplace, shape, dtype, device):
        x = torch.ones(shape, device=device, dtype=dtype)
        output, grad = through(QDropout(0.5, inplace), x)
        assert output.dtype == grad.dtype == dtype
        assert_same_bits(grad, output)
        assert set(output.unique().tolist()) <= {0.0, 2.0}

    @in_turn(
        layout=tuple(LAYOUTS),
        grad_layout=tuple(LAYOUTS),
        inplace=[False, True],
    )
    def test_layouts(self, layout, grad_layout, inplace, device):
        x = LAYOUTS[layout](torch.randn(3, 5, 9, 11, device=device) + 9)
        grad_output = LAYOUTS[grad_layout](torch.randn_like(x) + 9)
        output, grad = through(QDropout(0.3, inplace), x, grad_output)
        kept = output != 0
        assert 0.6 < float(kept.double().mean()) < 0.8
        assert torch.equal(grad != 0, kept)
        scale = 65536 / (65536 - round(0.3 * 65536))
        torch.testing.assert_close(output[kept], x[kept] * scale)
        torch.testing.assert_close(grad[kept], grad_output[kept] * scale)

    @pytest.mark.parametrize('p', [0.02, 0.5, 0.9])
    def test_rate_and_mean(self, p, device):
        n = 1 << 20
        x = torch.ones(n, device=device)
        for ours in (QDropout(p), nn.Dropout(p)):
            output, grad = through(ours, x)
            error = math.sqrt(p * (1 - p) / n)
            rate = float((output == 0).double().mean())
            assert abs(rate - p) < 4 * error + 2**-17
            assert abs(float(output.double().mean()) - 1) < 4 * error / (1 - p)
            assert torch.equal(grad, output)

    def test_every_call_drops_others(self, device):
        dropout = QDropout()
        x = torch.ones(4096, device=device)
        first, second = (through(dropout, x)[0] for _ in range(2))
        assert 0.4 < float((first == second).double().mean()) < 0.6

    @in_turn(p=[0.0, 1.0])
    def test_certainties(self, p, device):
        x = torch.randn(4, 7, device=device)
        expected = gradients(nn.Dropout(p), x, torch.ones_like(x))
        found = gradients(QDropout(p), x, torch.ones_like(x))
        assert_same_bits(found['output'], expected['output'])
        assert_same_bits(found['input'], expected['input'])

    def test_autocast(self, device):
        x = torch.randn(16, 8, device=device, requires_grad=True)
        linear = nn.Linear(8, 8, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            output = QDropout()(linear(x))
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert x.grad.dtype == torch.float32

    def test_float64(self, device):
        x = torch.ones(3, device=device, dtype=torch.float64)
        with pytest.raises(TypeError, match='torch.float64'):
            QDropout()(x.requires_grad_())


class TestWhereItIsTheParent:
    @in_turn(inplace=[False, True])
    def test_exact_level(self, inplace, device):
        x = torch.randn(3, 5, 9, 11, device=device)
        dropout = at_level(nn.Dropout(0.3, inplace), 'L0')
        assert type(dropout) is QDropout and dropout.quantizer.exact
        torch.manual_seed(3)
        found = through(dropout, x)
        torch.manual_seed(3)
        expected = through(nn.Dropout(0.3, inplace), x)
        for actual, wanted in zip(found, expected):
            assert_same_bits(actual, wanted)

    def test_eval(self, device):
        x = torch.randn(4, 7, device=device, requires_grad=True)
        assert QDropout().eval()(x) is nn.Dropout().eval()(x)

    def test_in_place_on_a_leaf(self, device):
        leaf = torch.ones(4, 7, device=device, requires_grad=True)
        for dropout in (nn.Dropout(inplace=True), QDropout(inplace=True)):
            with pytest.raises(RuntimeError, match='leaf Variable'):
                dropout(leaf)
            assert (leaf == 1).all()


class TestSeed:
    def test_follows_torch(self, device):
        x = torch.ones(256, device=device)
        torch.manual_seed(7)
        first = through(QDropout(), x)[0]
        torch.manual_seed(7)
        assert torch.equal(through(QDropout(), x)[0], first)

    @in_turn(use_reentrant=[False, True], inplace=[False, True])
    def test_checkpoint(self, use_reentrant, inplace, device):
        """The recomputed mask is the one that made the output."""
        leaf = torch.ones(4, 1024, device=device, requires_grad=True)
        # The square keeps the output of dropout: recomputed with another
        # mask, it would not fit the first.
        masks = []

        def block(x):
            y = dropout(x * 1)
            masks.append(y.detach().clone())
            return y**2

        dropout = QDropout(0.5, inplace)
        output = checkpoint(block, leaf, use_reentrant=use_reentrant)
        torch.rand(5)  # what follows draws, too
        output.sum().backward()
        assert len(masks) == 2
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(output, masks[0] ** 2)
        assert torch.equal(leaf.grad, 2 * masks[0] ** 2)
        assert leaf.grad.any() and not leaf.grad.all()

    @in_turn(inplace=[False, True])
    def test_the_same_without_grad(self, inplace, device):
        x = torch.ones(64, device=device)
        torch.manual_seed(7)
        expected = through(QDropout(), x)[0]
        torch.manual_seed(7)
        with torch.no_grad():
            output = QDropout(inplace=inplace)(x.requires_grad_())
        assert torch.equal(output, expected)
        assert (output.data_ptr() == x.data_ptr()) == inplace

    def test_default_device(self, device):
        x = torch.ones(64, device=device)
        torch.manual_seed(7)
        expected = through(QDropout(), x)[0]
        torch.manual_seed(7)
        with torch.device('meta'):
            output = QDropout()(x.clone().requires_grad_())
        assert torch.equal(output, expected)


class TestAutograd:
    @in_turn(inplace=[False, True])
    def test_keeps_nothing(self, inplace, device):
        x = torch.randn(4, 7, device=device, requires_grad=True) * 1
        with saved_tensors() as saved:
            output = QDropout(0.5, inplace)(x)
        assert not saved and output.requires_grad

    def test_retain_graph(self, device):
        leaf = torch.ones(4, 7, device=device, requires_grad=True)
        output = QDropout()(leaf)
        for _ in range(2):
            (grad,) = torch.autograd.grad(
                output.sum(), leaf, retain_graph=True
            )
            assert torch.equal(grad, output)

    def test_double_backward(self, device):
        leaf = torch.full((64,), 3.0, device=device, requires_grad=True)
        output = QDropout()(leaf)
        factor = output.detach() / 3
        (grad,) = torch.autograd.grad(
            (output**2).sum(), leaf, create_graph=True
        )
        assert torch.equal(grad, 2 * output * factor)
        grad.sum().backward()
        assert torch.equal(leaf.grad, 2 * factor**2)

    def test_in_place_on_what_another_node_saved(self, device):
        leaf = torch.randn(4, 7, device=device, requires_grad=True)
        output = QDropout(inplace=True)(leaf.exp())
        with pytest.raises(RuntimeError, match='inplace operation'):
            output.sum().backward()

    def test_part_of_a_tensor(self, device):
        # A view whose base goes on to be used.
        leaf = torch.ones(2, 4, 64, device=device, requires_grad=True)
        whole = leaf * 1
        part = QDropout(inplace=True)(whole[:, 1:3])
        (whole.sum() + part.sum()).backward()
        assert torch.equal(leaf.grad[:, 1:3], 2 * part)
        assert (leaf.grad[:, 0] == 1).all()


class TestModule:
    @in_turn(
        duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_duplicates(self, duplicate, device):
        twin = duplicate(QDropout(0.3, inplace=True))
        assert type(twin) is QDropout and twin.inplace and twin.p == 0.3
        x = torch.ones(64, device=device)
        torch.manual_seed(7)
        found = through(twin, x)[0]
        torch.manual_seed(7)
        assert_same_bits(found, through(QDropout(0.3, True), x)[0])

    def test_state_dict(self):
        assert not QDropout().state_dict()

    def test_repr(self):
        assert repr(QDropout(0.1)) == (
            'QDropout(p=0.1, inplace=False, bits=0)'
        )

    @in_turn(p=[-0.1, 1.1])
    def test_errors_of_the_constructor(self, p):
        for cls in (nn.Dropout, QDropout):
            with pytest.raises(ValueError, match='between 0 and 1'):
                cls(p)

    def test_of_mmcv(self, device):
        model = nn.Sequential(MMCVDropout(drop_prob=0.25))
        convert_model(model)
        assert type(model[0]) is QDropout and model[0].p == 0.25
        output, grad = through(model[0], torch.ones(64, device=device))
        assert torch.equal(output, grad)
        revert_model(model)
        assert type(model[0]) is MMCVDropout


class TestWholeChannels:
    @in_turn(
        inplace=[False, True],
        layout=tuple(LAYOUTS),
        dtype=[*DTYPES, torch.float64],
    )
    def test_one_number_a_channel(self, inplace, layout, dtype, device):
        x = LAYOUTS[layout](torch.rand(4, 6, 9, 11, device=device) + 1)
        x = x.to(dtype)
        output, grad = through(QDropout2d(0.5, inplace), x)
        assert output.dtype == grad.dtype == dtype
        # The factors, which a gradient of ones shows.
        factors = grad.flatten(2)
        assert torch.equal(factors, factors[..., :1].expand_as(factors))
        assert set(factors.unique().tolist()) == {0.0, 2.0}
        torch.testing.assert_close(output, x * grad)

    @pytest.mark.parametrize('p', [0.1, 0.7])
    def test_rate_and_mean(self, p, device):
        n = 1 << 14
        x = torch.ones(n // 64, 64, 2, 2, device=device)
        output, _ = through(QDropout2d(p), x)
        error = math.sqrt(p * (1 - p) / n)
        rate = float((output == 0).double().mean())
        assert abs(rate - p) < 4 * error + 2**-17
        assert abs(float(output.double().mean()) - 1) < 4 * error / (1 - p)

    def test_keeps_nothing(self):
        x = torch.randn(4, 6, 9, 11, requires_grad=True)
        with saved_tensors() as saved:
            QDropout2d()(x)
        assert saved == []

    @in_turn(use_reentrant=[False, True])
    def test_checkpointed(self, use_reentrant, device):
        x = torch.ones(4, 6, 9, 11, device=device)
        leaf = x.clone().requires_grad_()
        output = checkpoint(QDropout2d(0.5), leaf, use_reentrant=use_reentrant)
        output.sum().backward()
        assert torch.equal(leaf.grad, output.detach())

    def test_second_derivative(self):
        x = torch.ones(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        output = QDropout2d(0.5)(x)
        (grad,) = torch.autograd.grad(
            output.square().sum(), x, create_graph=True
        )
        (second,) = torch.autograd.grad(grad.sum(), x)
        assert torch.equal(second, 2 * output.detach().square())

    def test_other_calls_are_torchs(self):
        x = torch.randn(3, 4, 5, 5)
        assert QDropout2d().eval()(x) is nn.Dropout2d().eval()(x)
        for p in (0.0, 1.0):
            expected = nn.Dropout2d(p)(x)
            assert_same_bits(QDropout2d(p)(x), expected)
        exact = nn.Dropout2d()
        convert_model(exact, 'L0')
        assert type(exact) is QDropout2d
        found = []
        for dropout in (exact, nn.Dropout2d()):
            torch.manual_seed(3)
            found.append(dropout(x))
        assert_same_bits(*found)
        with pytest.warns(UserWarning, match='3D input'):
            QDropout2d()(x[0])
        revert_model(exact)
        assert type(exact) is nn.Dropout2d

    def test_refuses_a_leaf_as_torch(self):
        x = torch.randn(3, 4, 5, 5, requires_grad=True)
        with pytest.raises(RuntimeError, match='leaf'):
            QDropout2d(inplace=True)(x)
