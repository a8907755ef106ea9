"""Offset tensors of all ops that take one."""

import pytest
import torch
from support.cuda_graph import capture, warm_up
from support.layers import assert_same_bits
from support.opcheck import opcheck
from support.pairs import case, pairs

from mmactnn import ops
from mmactnn.ops import reference

SHAPE = (3, 8, 8, 8)


def make_vectors(x):
    """Made where they are used, so that a graph can be captured of it."""
    vectors = torch.linspace(0.5, 1.5, 4 * x.shape[1], device=x.device)
    return vectors.view(4, -1)


def make_widths(x):
    """1, 2 and 3 bits."""
    samples = torch.arange(3, device=x.device)
    row_starts = samples * (samples + 1) // 2
    return (samples + 1).to(torch.uint8), row_starts.int(), 6


def quantize(x, module=ops, **random):
    return module.quantize(x, 3, 256, **random)


def quantize_rows(x, module=ops, **random):
    return module.quantize_rows(x, *make_widths(x), 256, **random)


def norm_act(x, module=ops, **random):
    vectors = make_vectors(x)
    return module.norm_act(x, x.flip(0), *vectors, True, 2, 3, 256, **random)


def dropout(x, module=ops, **random):
    return (module.dropout(x, 0.4, **random),)


def dropout_(x, **random):
    return (ops.dropout_(x.clone(), 0.4, **random),)


def relu_codes(x, module=ops, **random):
    return module.relu_codes(x, 3, 256, **random)


def relu_codes_(x, **random):
    return ops.relu_codes_(x.clone(), 3, 256, **random)


def batch_norm_act(x, op=ops.batch_norm_act, **random):
    mean, var, weight, bias = make_vectors(x)
    settings = ops.NormSettings(mean, var, None, False, 0.1, 1e-5)
    *_, codes = op(
        x.clone(), x.flip(0), weight, bias, settings, True, 2, 3, 256, **random
    )
    return codes


def batch_norm_act_(x, **random):
    return batch_norm_act(x, ops.batch_norm_act_, **random)


SPECIFIED = [quantize, quantize_rows, norm_act, relu_codes, dropout]
CALLS = [*SPECIFIED, relu_codes_, dropout_, batch_norm_act, batch_norm_act_]


def rounding(call, rotated):
    """Keyword arguments of a call; that of dropout rounds nothing."""
    return {} if call in (dropout, dropout_) else dict(rotated=rotated)


def number(value, device, dtype=torch.int64):
    return torch.tensor([value], dtype=dtype, device=device)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one.cpu(), other.cpu())


@pytest.mark.parametrize('call', CALLS)
def test_moves_the_offset(call, device):
    for row in pairs(
        dtype=[torch.float32, torch.bfloat16],
        places=[(3, 5), (0, 1 << 40), (7, -2), (-1, 1)],
        rotated=[False, True],
    ):
        x = torch.randn(SHAPE, device=device).to(row['dtype'])
        offset, count = row['places']
        format = rounding(call, row['rotated'])
        random = dict(seed=9, offset=offset, **format)
        with case(**row):
            moved = call(x, **random, offset_tensor=number(count, device))
            again = call(x, seed=9, offset=offset + count, **format)
            assert_same(moved, again)
            none = call(x, **random)
            assert any((a != b).any() for a, b in zip(moved, none))
            zero = call(x, **random, offset_tensor=number(0, device))
            assert_same(zero, none)


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('call', SPECIFIED)
def test_specification(call, rotated, device):
    x = torch.randn(SHAPE, device=device)
    random = dict(seed=2, offset=11, **rounding(call, rotated))
    actual = call(x, **random, offset_tensor=number(1 << 33, device))
    expected = call(
        x.cpu(), reference, **random, offset_tensor=number(1 << 33, 'cpu')
    )
    assert_same(actual, expected)


@pytest.mark.parametrize('call', CALLS)
def test_counts_that_do_not_fit(call, device):
    x = torch.randn(SHAPE, device=device)
    for wrong in (
        number(1, device, torch.int32),
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
    ):
        with pytest.raises(
            RuntimeError, match='offset_tensor must be an int64'
        ):
            call(x, seed=1, offset_tensor=wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('call', CALLS)
def test_count_on_another_device(call):
    x = torch.randn(SHAPE, device='cuda')
    with pytest.raises(
        RuntimeError, match='offset_tensor must be on the device'
    ):
        call(x, seed=1, offset_tensor=number(1, 'cpu'))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('call', CALLS)
def test_replays_count(call):
    x = torch.randn(SHAPE, device='cuda')
    counter = number(0, 'cuda')

    def step():
        counter.add_(1)
        return call(x, seed=9, offset=4, offset_tensor=counter)

    warm_up(step)
    counter.zero_()
    replay, found = capture(step)
    for count in range(1, 4):
        replay()
        assert_same(found, call(x, seed=9, offset=4 + count))


def test_opcheck(device):
    x = torch.randn(SHAPE, device=device)
    mean, var, weight, bias = vectors = make_vectors(x)
    norm = (x.flip(0), weight, bias, mean, var, None, False, 0.1, 1e-5)
    arguments = dict(
        quantize=(3, 64),
        quantize_rows=(*make_widths(x), 64),
        norm_act=(x.flip(0), *vectors, True, 2, 3, 64),
        batch_norm_act=(*norm, True, 2, 3, 64),
        batch_norm_act_=(*norm, True, 2, 3, 64),
        relu_codes=(3, 64),
        relu_codes_=(3, 64),
        dropout=(0.4,),
        dropout_=(0.4,),
    )
    for name, format in arguments.items():
        opcheck(
            getattr(torch.ops.mmactnn, name).default,
            (x.clone(), *format, 1, 2, number(3, device)),
        )
