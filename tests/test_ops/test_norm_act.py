"""Fused normalisation and decoding of rectified values."""

import math

import pytest
import torch
from support.layers import assert_same_bits
from support.opcheck import opcheck
from support.pairs import case, in_turn
from support.roundings import encoding

from mmactnn import ops
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (3, 8, 16, 16),
    (2, 5, 7, 7),
    (2, 16, 5, 7),
    (2, 64, 3, 5),  # of whole groups, which end inside of channels
    (2, 64, 3, 4),  # the same of groups of 256
    (3, 3),
    (2, 6, 11),
    (1, 4, 3, 5, 7),
    (2, 1, 9, 1),
    (0, 4, 3, 3),
)
# relu, residual, bits, bits of the output
MODES = {
    'plain': (False, False, 2, 0),
    'plain, 5 bits': (False, False, 5, 0),
    'plain, 1 bit': (False, False, 1, 0),
    'relu, 2 bits': (True, False, 2, 0),
    'relu': (True, False, 3, 0),
    'relu, 4 bits': (True, False, 4, 0),
    'relu, 8 bits': (True, False, 8, 0),
    'add': (True, True, 2, 2),
    'add, 3 bits': (True, True, 3, 3),
    'add, 4 bits': (True, True, 4, 4),
    'add, 1 and 7 bits': (True, True, 1, 7),
}


def make(shape, dtype, channels_last, special=False, device='cpu'):
    x = torch.randn(shape) * 2 + 0.5
    residual = torch.randn(shape)
    if special and x.numel():
        flat = x.view(-1)
        flat[0], flat[-1] = math.nan, math.inf
        flat[flat.numel() // 2] = -math.inf
    x, residual = x.to(dtype), residual.to(dtype)
    if channels_last:
        x, residual = (
            t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual)
        )
    channels = shape[1]
    mean, bias = torch.randn(2, channels)
    invstd, weight = torch.rand(2, channels) + 0.5
    weight[0] = -weight[0]
    if channels > 1:
        weight[1] = 0.0  # as where a residual branch starts
    return [t.to(device) for t in (x, residual, mean, invstd, weight, bias)]


def run(
    op,
    tensors,
    mode,
    group_size=64,
    seed=5,
    offset=9,
    affine=True,
    rounding='dither',
):
    relu, adds, bits, act_bits = MODES[mode]
    x, residual, mean, invstd, weight, bias = tensors
    return op(
        x,
        residual if adds else None,
        mean,
        invstd,
        weight if affine else None,
        bias if affine else None,
        relu,
        bits,
        act_bits,
        group_size,
        **encoding(rounding, seed, offset),
    )


def specified(tensors, mode, **kwargs):
    on_cpu = [t.cpu() for t in tensors]
    return run(reference.norm_act, on_cpu, mode, **kwargs)


def assert_as_specified(found, expected):
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected):
        if wanted.numel():
            assert actual.stride() == wanted.stride()
        # Sign of zero and bits of NaN are not specified.
        actual, wanted = actual.cpu(), wanted
        if actual.is_floating_point():
            actual, wanted = actual + 0.0, wanted + 0.0
        assert_same_bits(actual, wanted)


@in_turn(
    by='mode',
    mode=tuple(MODES),
    shape=SHAPES,
    dtype=DTYPES,
    channels_last=[False, True],
    special=[False, True],
    rounding=ops.ROUNDINGS,
)
def test_as_specified(
    mode, shape, dtype, channels_last, special, rounding, device
):
    tensors = make(shape, dtype, channels_last, special, device)
    format = dict(
        rounding=rounding, group_size=256 if rounding == 'rotated' else 64
    )
    found = run(ops.norm_act, tensors, mode, **format)
    assert_as_specified(found, specified(tensors, mode, **format))
    if 'plain' not in mode:
        assert_decodes_as_specified(found, tensors, mode, **format)


def assert_decodes_as_specified(results, tensors, mode, rounding, group_size):
    _, adds, bits, act_bits = MODES[mode]
    x, weight, bias = tensors[0], *tensors[4:]
    _, *payload = results
    layout = x.shape, x.stride(), x.dtype
    if adds:
        arguments = (*payload[2:], *layout, act_bits, group_size)
        name = 'dequantize_zeroed'
    else:
        arguments = (*payload[:2], weight, bias, *layout, bits, group_size)
        name = 'dequantize_split'
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    drawn = ops.DrawnBits.of(rounding, 5, 9)
    if adds and drawn:
        drawn = drawn.second()
    found = getattr(ops, name)(*arguments, drawn=drawn)
    expected = getattr(reference, name)(*on_cpu, drawn)
    assert found.dtype == x.dtype
    if x.numel():
        assert found.stride() == x.stride()
    assert_same_bits(found.cpu() + 0.0, expected + 0.0)


@pytest.mark.parametrize('dtype', DTYPES[1:], ids=str)
@pytest.mark.parametrize('mode', ['relu, 2 bits', 'relu', 'relu, 4 bits'])
def test_outputs_beyond_the_dtype(mode, dtype, device):
    tensors = make((2, 64, 3, 4), dtype, False, device=device)
    x, weight, bias = tensors[0], *tensors[4:]
    # In every third channel: neighbours, which share blocks, are not.
    weight[::3] *= torch.finfo(dtype).max
    layout = x.shape, x.stride(), dtype, MODES[mode][2]
    for rounding in ops.ROUNDINGS:
        _, codes, ranges, *_ = run(
            ops.norm_act, tensors, mode, 256, rounding=rounding
        )
        arguments = codes, ranges, weight, bias
        drawn = ops.DrawnBits.of(rounding, 5, 9)
        found = ops.dequantize_split(*arguments, *layout, drawn=drawn)
        expected = reference.dequantize_split(
            *(a.cpu() for a in arguments), *layout, 256, drawn
        )
        # Infinities of float32 stay, and the rest is clamped.
        assert (found.abs() >= torch.finfo(dtype).max).any()
        assert_same_bits(found.cpu() + 0.0, expected + 0.0)


@pytest.mark.parametrize('mode', ['plain', 'relu', 'add'])
def test_group_sizes(mode, device):
    tensors = make((2, 16, 9, 13), torch.float32, False, device=device)
    for group_size in ops.GROUP_SIZES:
        found = run(ops.norm_act, tensors, mode, group_size)
        expected = specified(tensors, mode, group_size=group_size)
        with case(group_size=group_size):
            assert_as_specified(found, expected)


@pytest.mark.parametrize('mode', ['plain', 'relu', 'add'])
def test_without_weight_and_bias(mode, device):
    tensors = make((2, 4, 8, 8), torch.float32, False, device=device)
    found = run(ops.norm_act, tensors, mode, affine=False)
    assert_as_specified(found, specified(tensors, mode, affine=False))


@pytest.mark.parametrize('rounding', ops.ROUNDINGS)
@pytest.mark.parametrize('mode', ['relu', 'add'])
def test_zeros_are_exact(mode, rounding, device):
    tensors = make((4, 8, 16, 16), torch.float32, False, device=device)
    tensors[4].abs_().add_(0.1)
    output, codes, ranges, act_codes, act_ranges = run(
        ops.norm_act, tensors, mode, 256, rounding=rounding
    )
    layout = output.shape, output.stride(), output.dtype
    drawn = ops.DrawnBits.of(rounding, 5, 9)
    if mode == 'add':
        value = ops.dequantize_zeroed(
            *(act_codes, act_ranges, *layout, 2),
            drawn=drawn and drawn.second(),
        )
    else:
        value = ops.dequantize_split(
            codes, ranges, *tensors[4:], *layout, 3, drawn=drawn
        )
    assert not value[output == 0].any()
    if rounding == 'stochastic':
        # The lowest of the others' range may be rounded to a hair below 0.
        assert (value[output > 0] > -0.05).all()


@pytest.mark.parametrize('mode', ['relu', 'add'])
def test_dither_is_unbiased_at_half_the_variance(mode, device):
    tensors = make((2, 4, 16, 16), torch.float32, False, device=device)
    # All outputs are positive, and none lies on a code.
    tensors[4].abs_().add_(0.1)
    tensors[5].add_(20)
    draws, total, squares = 400, 0.0, 0.0
    for seed in range(draws):
        output, codes, ranges, act_codes, act_ranges = run(
            ops.norm_act, tensors, mode, 256, seed=seed
        )
        layout = output.shape, output.stride(), output.dtype
        # The offset of run().
        drawn = ops.DrawnBits(seed, 9)
        if mode == 'add':
            value = ops.dequantize_zeroed(
                act_codes, act_ranges, *layout, 2, 256, drawn=drawn.second()
            )
        else:
            affine = tensors[4:]
            value = ops.dequantize_split(
                codes, ranges, *affine, *layout, 3, 256, drawn=drawn
            )
        error = (value - output).double()
        total, squares = total + error, squares + error.square()
    assert (output > 0).all()
    # One group for each channel of a sample.
    if mode == 'add':
        step = act_ranges[..., 1].double().view(2, 4, 1, 1)
    else:
        step = ranges[..., 3].double().view(2, 4, 1, 1)
        step = step * tensors[4].double().view(1, 4, 1, 1)
    z = total / draws / (step.square() / 12 / draws).sqrt()
    assert z.abs().max() < 5
    assert float(z.square().mean()) == pytest.approx(1, abs=0.1)
    ratio = squares / draws / (step.square() / 12)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize('mode', ['relu', 'add'])
def test_unbiased(mode, device):
    tensors = make((2, 4, 16, 16), torch.float32, False, device=device)
    draws, total, squares = 400, 0.0, 0.0
    for seed in range(draws):
        output, codes, ranges, act_codes, act_ranges = run(
            ops.norm_act, tensors, mode, 256, seed=seed
        )
        layout = output.shape, output.stride(), output.dtype
        if mode == 'add':
            value = ops.dequantize_zeroed(
                act_codes, act_ranges, *layout, 2, 256
            )
        else:
            value = ops.dequantize_split(
                codes, ranges, *tensors[4:], *layout, 3, 256
            )
        error = (value - output).double()
        total, squares = total + error, squares + error.square()
    mean = (total / draws).square().sum()
    single = (squares / draws).sum()
    assert float(mean) < 1.5 * float(single) / draws
    assert float(single) > 0


def test_wrong_arguments(device):
    x, residual, mean, invstd, weight, bias = make(
        (2, 4, 8, 8), torch.float32, False, device=device
    )

    def call(**changes):
        arguments = dict(
            input=x,
            residual=None,
            mean=mean,
            invstd=invstd,
            weight=weight,
            bias=bias,
            relu=True,
            bits=3,
            act_bits=0,
            seed=1,
        )
        return ops.norm_act(**{**arguments, **changes})

    with pytest.raises(ValueError, match='from 2 to 8.*got 1'):
        call(bits=1)
    with pytest.raises(ValueError, match='from 1 to 8, got 9'):
        call(bits=9)
    with pytest.raises(ValueError, match='act_bits .* got 0'):
        call(residual=residual)
    with pytest.raises(ValueError, match='relu must be True'):
        call(residual=residual, relu=False, act_bits=2)
    with pytest.raises(ValueError, match='shape'):
        call(residual=residual[:1], act_bits=2)
    with pytest.raises(TypeError, match='dtype of input.*got torch.float16'):
        call(residual=residual.half(), act_bits=2)
    with pytest.raises(ValueError, match='2 to 5 dimensions'):
        call(input=x[0, 0, 0])
    with pytest.raises(TypeError, match='float64'):
        call(input=x.double())
    with pytest.raises((RuntimeError, ValueError), match='mean'):
        call(mean=mean[:2])
    with pytest.raises((RuntimeError, TypeError, ValueError), match='weight'):
        call(weight=weight.double())
    _, codes, ranges, *_ = call()
    layout = x.shape, x.stride(), x.dtype
    with pytest.raises(ValueError, match='from 2 to 8.*got 1'):
        ops.dequantize_split(codes, ranges, weight, bias, *layout, 1)
    with pytest.raises(RuntimeError, match='codes'):
        ops.dequantize_split(codes, ranges, weight, bias, *layout, 4)
    with pytest.raises(RuntimeError, match='ranges'):
        ops.dequantize_zeroed(codes, ranges, *layout, 3)


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('mode', ['plain', 'relu', 'add'])
def test_opcheck(mode, rotated, device):
    tensors = make((2, 4, 8, 8), torch.float32, False, device=device)
    relu, adds, bits, act_bits = MODES[mode]
    x, residual, mean, invstd, weight, bias = tensors
    arguments = (
        residual if adds else None,
        mean,
        invstd,
        weight,
        bias,
        relu,
        bits,
        act_bits,
        256,
        1,
        2,
        None,
        rotated,
    )
    opcheck(torch.ops.mmactnn.norm_act.default, (x, *arguments))
    _, *payload = torch.ops.mmactnn.norm_act.default(x, *arguments)
    layout = x.shape, x.stride(), x.dtype
    drawn = [1, 2, 0, int(rotated)]
    if mode == 'relu':
        opcheck(
            torch.ops.mmactnn.dequantize_split.default,
            (*payload[:2], weight, bias, *layout, bits, 256, drawn),
        )
    elif mode == 'add':
        opcheck(
            torch.ops.mmactnn.dequantize_zeroed.default,
            (*payload[2:], *layout, act_bits, 256, drawn),
        )
