"""Compressed pooling against torch's."""

import copy
import functools
import math
import pickle

import pytest
import torch
from support.layers import (
    assert_same_bits,
    at_level,
    exact_numerics,
    gradients,
    saved_tensors,
)
from support.pairs import in_turn, in_turn_by_group, pairs
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import QAdaptiveAvgPool2d, QAvgPool2d, QMaxPool2d

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (2, 3, 9, 11),
    (3, 9, 11),
    (0, 3, 9, 11),
    (2, 8, 8, 12),
    (1, 1, 9, 9),
)
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    'gaps': lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    'part': lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    'part of channels_last': lambda x: torch.cat([x, x], dim=1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
}


class Pair:
    """A compressed layer, and torch's of the same arguments."""

    def __init__(self, ours, theirs, *args, **kwargs):
        self.ours = functools.partial(ours, *args, **kwargs)
        self.theirs = functools.partial(theirs, *args, **kwargs)

    def __repr__(self):
        return repr(self.theirs())


maximum = functools.partial(Pair, QMaxPool2d, nn.MaxPool2d)
average = functools.partial(Pair, QAvgPool2d, nn.AvgPool2d)
adaptive = functools.partial(Pair, QAdaptiveAvgPool2d, nn.AdaptiveAvgPool2d)
PAIRS = {
    'max': maximum(2),
    'max of a stem': maximum(3, stride=2, padding=1),
    'max, ceil_mode': maximum(3, 2, ceil_mode=True),
    'max, dilated': maximum(3, stride=1, padding=1, dilation=2),
    'max, oblong': maximum((2, 3), (1, 2), (0, 1), (2, 1)),
    'max, lists': maximum([3], stride=[2], padding=[1], dilation=[1]),
    'max, wide': maximum(5, stride=1, padding=2),
    'max, wide and oblong': maximum((9, 3), (2, 1), (4, 1), ceil_mode=True),
    'max, wide and dilated': maximum(5, 1, 2, dilation=2),
    'average': average(2),
    'average, padded': average(3, stride=2, padding=1),
    'average, pad not counted': average(
        3, stride=2, padding=1, count_include_pad=False, ceil_mode=True
    ),
    'average, oblong': average((2, 3), (1, 2), (0, 1)),
    'average, divisor': average(3, divisor_override=5),
    'adaptive': adaptive(3),
    'adaptive, oblong': adaptive((2, 5)),
    'adaptive, as large': adaptive((None, 4)),
    'adaptive, one pixel': adaptive(1),
}
SMALL = ['max of a stem', 'average, padded', 'adaptive']


def every_pair(**axes):
    """Decorator that runs a test with all pairs, class by class."""
    groups = {}
    for name, pair in PAIRS.items():
        groups.setdefault(name.split(',')[0].split()[0], []).append(pair)
    return in_turn_by_group(
        {name: pairs(pair=members, **axes) for name, members in groups.items()}
    )


@pytest.fixture(params=SMALL)
def typical(request):
    """One pair a class."""
    return PAIRS[request.param]


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def make_input(device, shape=(2, 3, 9, 11), dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype)


def assert_same(found, expected):
    assert found.keys() == expected.keys() == {'output', 'input'}
    assert found['output'].stride() == expected['output'].stride()
    assert_same_bits(found['output'], expected['output'])
    actual, wanted = found['input'], expected['input']
    assert actual.dtype == wanted.dtype
    # Gradients of windows that overlap are added up in another order.
    error = 4 * torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(actual, wanted, rtol=error, atol=error)


def compare(pair, x, level=None):
    """Forward and backward of both; the results of ours."""
    ours, theirs = pair.ours(), pair.theirs()
    if level is not None:
        at_level(ours, level)
    with torch.no_grad():
        # Integers: sums of them are exact, whatever their order.
        grad_output = torch.randint_like(theirs(x), -3, 4)
    found = gradients(ours, x, grad_output)
    expected = gradients(theirs, x, grad_output)
    assert_same(found, expected)
    return found, expected


class TestAgainstTorch:
    @every_pair(shape=SHAPES, dtype=DTYPES)
    def test_dtypes_and_shapes(self, shape, dtype, pair, device):
        compare(pair, make_input(device, shape, dtype))

    @every_pair(layout=tuple(LAYOUTS))
    def test_layouts(self, layout, pair, device):
        x = LAYOUTS[layout](make_input(device))
        found, expected = compare(pair, x)
        if layout in ('contiguous', 'channels_last'):
            assert found['input'].stride() == expected['input'].stride()

    @in_turn(layout=['gaps', 'channels_last'])
    def test_layouts_of_the_gradient(self, layout, typical, device):
        x = make_input(device)
        grad_output = torch.randn_like(typical.theirs()(x))
        grad_output = LAYOUTS[layout](grad_output)
        assert_same(
            gradients(typical.ours(), x, grad_output),
            gradients(typical.theirs(), x, grad_output),
        )

    @every_pair(level=['L0', 'eval'], channels_last=[False, True])
    def test_where_it_is_the_parent(self, level, channels_last, pair, device):
        x = make_input(device)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        ours, theirs = pair.ours(), pair.theirs()
        ours.eval() if level == 'eval' else at_level(ours, level)
        grad_output = torch.randn_like(theirs(x))
        found = gradients(ours, x, grad_output)
        expected = gradients(theirs, x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        if device.type == 'cpu':
            assert_same_bits(found['input'], expected['input'])
        else:  # torch's own kernels add in any order there
            assert_same(found, expected)

    @in_turn(dtype=DTYPES)
    def test_max_without_overlap(self, dtype, device):
        x = make_input(device, dtype=dtype)
        grad_output = torch.randn_like(nn.MaxPool2d(2)(x))
        found = gradients(QMaxPool2d(2), x, grad_output)
        expected = gradients(nn.MaxPool2d(2), x, grad_output)
        assert_same_bits(found['output'], expected['output'])
        assert_same_bits(found['input'], expected['input'])

    def test_float64(self, typical, device):
        # Where values are kept there have to be kernels; the gradients are
        # those of torch in float64.
        x = make_input(device)
        exact = gradients(typical.theirs(), x.double(), None)
        found = gradients(typical.ours(), x, None)
        torch.testing.assert_close(
            found['input'].double(), exact['input'], rtol=1e-6, atol=1e-6
        )
        leaf = x.double().requires_grad_()
        if typical is PAIRS['max of a stem']:
            with pytest.raises(TypeError, match='torch.float64'):
                typical.ours()(leaf)
        else:
            compare(typical, x.double())

    @in_turn(dtype=[torch.float16, torch.bfloat16])
    def test_autocast(self, dtype, typical, device):
        x = make_input(device)
        conv = nn.Conv2d(3, 4, 1, device=device)

        def run(pool):
            leaf = x.clone().requires_grad_()
            with torch.autocast(device.type, dtype):
                output = pool(conv(leaf)) + pool(leaf).mean()
            output.sum().backward()
            return dict(output=output.detach(), input=leaf.grad)

        found, expected = run(typical.ours()), run(typical.theirs())
        assert_same_bits(found['output'], expected['output'])
        torch.testing.assert_close(
            found['input'], expected['input'], rtol=1e-2, atol=1e-2
        )


class TestWhatIsKept:
    @in_turn(shape=[(2, 3, 9, 11), (3, 9, 11)])
    def test_max(self, shape, device):
        x = make_input(device, shape).requires_grad_()
        with saved_tensors() as saved:
            output = QMaxPool2d(3, 2)(x)
        assert [t.dtype for t in saved] == [torch.uint8]
        assert saved[0].nbytes == math.ceil(output.numel() / 2)

    @in_turn(
        name=['average', 'average, padded', 'adaptive', 'adaptive, oblong']
    )
    def test_average(self, name, device):
        x = make_input(device).requires_grad_()
        with saved_tensors() as saved:
            output = PAIRS[name].ours()(x)
        assert not saved and output.requires_grad

    @in_turn(level=['L0', 'eval'])
    def test_the_parent_keeps_its_input(self, level, typical, device):
        x = make_input(device).requires_grad_()
        pool = typical.ours()
        pool.eval() if level == 'eval' else at_level(pool, level)
        with saved_tensors() as saved:
            pool(x)
        assert saved[0].data_ptr() == x.data_ptr()

    def test_without_grad(self, typical, device):
        x = make_input(device)
        with saved_tensors() as saved:
            output = typical.ours()(x)
        assert not saved and not output.requires_grad
        with torch.no_grad():
            output = typical.ours()(x.requires_grad_())
        assert_same_bits(output, typical.theirs()(x))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
    @pytest.mark.parametrize('channels_last', [False, True])
    def test_backward_makes_no_second_tensor(self, channels_last):
        with torch.device('cuda'):
            x = torch.randn(8, 64, 64, 64)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        output = QAvgPool2d(2)(x)
        torch.use_deterministic_algorithms(False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output.backward(torch.ones_like(output))
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < 1.5 * x.nbytes


class TestParentsPath:
    """Windows that 8 bits cannot index, and indices for the caller."""

    def test_many_taps(self, device):
        pool = QMaxPool2d(17, stride=2)
        assert 'exact: window of 289 taps, 256 at most' in repr(pool)
        x = make_input(device, (2, 3, 19, 18))
        grad_output = torch.randn_like(pool(x))
        found = gradients(pool, x, grad_output)
        expected = gradients(nn.MaxPool2d(17, stride=2), x, grad_output)
        assert_same(found, expected)

    def test_return_indices(self, device):
        pool = QMaxPool2d(2, return_indices=True)
        assert 'exact: returns the indices' in repr(pool)
        x = make_input(device).requires_grad_()
        for found, expected in zip(
            pool(x), nn.MaxPool2d(2, return_indices=True)(x)
        ):
            assert torch.equal(found, expected)

    def test_wide_windows_keep_a_byte(self, device):
        pool = QMaxPool2d(16, stride=1)
        x = make_input(device, (2, 3, 40, 36)).requires_grad_()
        with saved_tensors() as kept:
            pool(x)
        assert [(t.dtype, t.numel()) for t in kept] == [
            (torch.uint8, 2 * 3 * 25 * 21)
        ]

    @in_turn(size=[4, (2, 8), [4]])
    def test_sixteen_taps(self, size, device):
        pool = QMaxPool2d(size)
        assert 'bits=4' in repr(pool)
        compare(maximum(size), make_input(device, (2, 3, 9, 17)))


class TestAutograd:
    def test_accumulation(self, typical, device):
        leaf = make_input(device).requires_grad_()
        pool = typical.ours()
        for _ in range(3):
            pool(leaf).sum().backward()
        expected = gradients(typical.theirs(), leaf, None)['input']
        torch.testing.assert_close(leaf.grad, 3 * expected)

    def test_retain_graph(self, typical, device):
        leaf = make_input(device).requires_grad_()
        output = typical.ours()(leaf)
        grads = [
            torch.autograd.grad(output.sum(), leaf, retain_graph=True)[0]
            for _ in range(2)
        ]
        assert torch.equal(*grads)

    @in_turn(use_reentrant=[False, True])
    def test_checkpoint(self, use_reentrant, typical, device):
        x = make_input(device)

        def run(pool):
            leaf = x.clone().requires_grad_()
            block = nn.Sequential(nn.SiLU(), pool, nn.SiLU())
            output = checkpoint(block, leaf, use_reentrant=use_reentrant)
            output.square().sum().backward()
            return leaf.grad

        torch.testing.assert_close(run(typical.ours()), run(typical.theirs()))

    @pytest.mark.parametrize('name', SMALL)
    def test_double_backward(self, name, device):
        x = make_input(device)

        def run(pool):
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(
                pool(leaf).square().sum(), leaf, create_graph=True
            )
            grad.square().sum().backward()
            return leaf.grad

        found = run(PAIRS[name].ours())
        torch.testing.assert_close(found, run(PAIRS[name].theirs()))

    def test_repeats(self, typical, device):
        x = make_input(device)
        first = gradients(typical.ours(), x, None)
        again = gradients(typical.ours(), x, None)
        assert_same_bits(first['input'], again['input'])


class TestModule:
    @every_pair(
        duplicate=[copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_duplicates(self, duplicate, pair, device):
        twin = duplicate(pair.ours())
        assert type(twin) is pair.ours.func
        x = make_input(device)
        expected = gradients(pair.theirs(), x, None)
        assert_same(gradients(twin, x, None), expected)

    @every_pair()
    def test_state_dict(self, pair):
        assert not pair.ours().state_dict()

    @every_pair()
    def test_repr(self, pair):
        ours, theirs = repr(pair.ours()), repr(pair.theirs())
        assert theirs.partition('(')[2][:-1] in ours

    def test_errors_of_the_constructor(self, typical):
        for make in (typical.ours, typical.theirs):
            with pytest.raises(TypeError, match='unknown'):
                make(unknown=1)

    @in_turn(
        [
            dict(pair=maximum(2), shape=(8, 8)),
            dict(pair=maximum(2, padding=2), shape=(1, 2, 8, 8)),
            dict(pair=maximum(2, stride=0), shape=(1, 2, 8, 8)),
            dict(pair=maximum(4), shape=(1, 2, 3, 8)),
            dict(pair=maximum((2, 2, 2)), shape=(1, 2, 8, 8)),
            dict(pair=maximum(2), shape=(1, 2, 0, 8)),
            dict(pair=average(2), shape=(8, 8)),
            dict(pair=average(2, padding=2), shape=(1, 2, 8, 8)),
            dict(pair=average(9), shape=(1, 2, 8, 8)),
            dict(pair=average(2, divisor_override=0), shape=(1, 2, 8, 8)),
            dict(pair=adaptive(2), shape=(8,)),
            dict(pair=adaptive((2, 2, 2)), shape=(1, 2, 8, 8)),
        ]
    )
    def test_errors_of_calls(self, pair, shape, device):
        x = torch.zeros(shape, device=device, requires_grad=True)
        errors = (RuntimeError, ValueError, IndexError)
        with pytest.raises(errors) as expected:
            pair.theirs()(x)
        with pytest.raises(expected.type) as found:
            pair.ours()(x)
        assert str(found.value) == str(expected.value)
