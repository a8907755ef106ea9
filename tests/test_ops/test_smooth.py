"""Codes of smooth activations against their specification."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.opcheck import opcheck
from support.pairs import in_turn

from mmactnn import ops
from mmactnn.ops import DrawnBits, Smooth, smooth_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((0, 4), (1,), (7,), (3, 5, 7, 11), (2, 16, 8, 8), (3, 300))
# Our function, and torch's.
FUNCTIONS = {
    'gelu': (Smooth.gelu(), F.gelu),
    'gelu tanh': (
        Smooth.gelu('tanh'),
        lambda x: F.gelu(x, approximate='tanh'),
    ),
    'silu': (Smooth.silu(), F.silu),
    'mish': (Smooth.mish(), F.mish),
    'hardswish': (Smooth.hardswish(), F.hardswish),
    'elu': (Smooth.elu(), F.elu),
    'elu 2': (Smooth.elu(2.0), lambda x: F.elu(x, 2.0)),
    'elu -1': (Smooth.elu(-1.0), lambda x: F.elu(x, -1.0)),
    'sigmoid': (Smooth.sigmoid(), torch.sigmoid),
    'tanh': (Smooth.tanh(), torch.tanh),
    'softplus': (Smooth.softplus(), F.softplus),
    'softplus 2, 5': (
        Smooth.softplus(2.0, 5.0),
        lambda x: F.softplus(x, 2.0, 5.0),
    ),
    'hardsigmoid': (Smooth.hardsigmoid(), F.hardsigmoid),
    'clamp': (Smooth.clamp(-0.5, 1), lambda x: x.clamp(-0.5, 1)),
}
MASKS = ('hardsigmoid', 'clamp')
DRAWN = DrawnBits.of('dither', 5, 3)
RANDOM = dict(seed=5, offset=3)
# Between the functions in float32 and in float64.
TOLERANCE = dict(rtol=1e-5, atol=5e-5)


def make(shape, dtype, device, channels_last=False, scale=2):
    generator = torch.Generator().manual_seed(5)
    x = scale * torch.randn(shape, generator=generator)
    x = x.to(device, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x


def torch_derivative(function, x):
    leaf = x.detach().double().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def joint(x, bits, group_size=256):
    codes = ops.quantize(x, bits, group_size, **RANDOM)
    layout = x.shape, x.stride(), x.dtype
    return codes, layout


@in_turn(name=tuple(FUNCTIONS))
def test_functions_of_the_specification(name):
    smooth, function = FUNCTIONS[name]
    # Not where a derivative jumps.
    x = torch.linspace(-4, 4, 4002)
    x = torch.cat([x, torch.linspace(-30, 30, 103)])
    found = smooth_reference.derivatives(x, smooth, 1)
    expected = function(x.double()), torch_derivative(function, x)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=2e-8)
    slopes = expected[1]
    assert slopes.min() >= smooth.low and slopes.max() < smooth.high + 1e-6
    # Wider by at most 2 % of the range: bits are not wasted.
    used = slopes.max() - slopes.min()
    assert used > 0.98 * (smooth.high - smooth.low)


@in_turn(
    where=lambda shape, channels_last, **_: (
        len(shape) == 4 or not channels_last
    ),
    by='name',
    name=tuple(FUNCTIONS),
    shape=SHAPES,
    dtype=DTYPES,
    bits=(1, 2, 3, 4, 5, 8),
    channels_last=[False, True],
)
def test_derivative(name, shape, dtype, bits, channels_last, device):
    smooth, _ = FUNCTIONS[name]
    x = make(shape, dtype, device, channels_last)
    codes = ops.smooth_derivative(x, smooth, bits, **RANDOM)
    expected = smooth_reference.smooth_derivative(x, smooth, bits, DRAWN)
    assert codes.shape == expected.shape
    # Functions differ in their last bits, and so may a code now and then.
    differ = int((codes != expected).sum())
    assert differ <= 1 + x.numel() // 1000
    grad = make(shape, dtype, device, channels_last, 1).flip(0)
    grad = torch.empty_like(x).copy_(grad)
    for drawn in (DRAWN, None):
        found = ops.smooth_derivative_backward(
            grad, codes, smooth, bits, drawn=drawn
        )
        wanted = smooth_reference.smooth_derivative_backward(
            grad, codes, smooth, bits, drawn
        )
        assert found.stride() == grad.stride() and found.dtype == dtype
        assert torch.equal(found, wanted)
    # Half a step, and what a half rounds.
    found = ops.smooth_derivative_backward(
        grad, codes, smooth, bits, drawn=DRAWN
    )
    exact = torch_derivative(FUNCTIONS[name][1], x) * grad.double()
    half = 0.501 * (smooth.high - smooth.low) / (2**bits - 1)
    error = (found.double() - exact).abs()
    half = half + 4e-6 + 0.01 * (dtype != torch.float32)
    assert (error <= half * grad.double().abs() + 1e-7).all()


@in_turn(
    where=lambda shape, channels_last, **_: (
        len(shape) == 4 or not channels_last
    ),
    by='name',
    name=tuple(FUNCTIONS),
    shape=SHAPES,
    dtype=DTYPES,
    bits=(1, 3, 4, 8),
    group_size=(64, 256),
    channels_last=[False, True],
    drawn=[None, DRAWN],
)
def test_code_of_the_input(
    name, shape, dtype, bits, group_size, channels_last, drawn, device
):
    smooth, _ = FUNCTIONS[name]
    x = make(shape, dtype, device, channels_last)
    codes, layout = joint(x, bits, group_size)
    value, derivative = smooth_reference.smooth_decoded(
        *codes, *layout[:2], smooth, bits, group_size, drawn
    )
    format = dict(bits=bits, group_size=group_size, drawn=drawn)
    found = ops.smooth_decode(*codes, *layout, smooth, **format)
    assert found.stride() == x.stride()
    tolerance = TOLERANCE
    if dtype != torch.float32:
        tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    torch.testing.assert_close(found, value.to(dtype), **tolerance)
    grad = torch.empty_like(x).copy_(make(shape, dtype, device).flip(0))
    found = ops.smooth_decode_backward(grad, *codes, smooth, **format)
    assert found.stride() == x.stride()
    wanted = (grad.double() * derivative).to(dtype)
    if name in ('hardswish', 'hardsigmoid', 'clamp', 'softplus 2, 5'):
        # Where a derivative jumps, the last bit of an argument decides.
        near = (found.double() - wanted.double()).abs() < 0.01
        assert near.double().mean() > 0.99 or not x.numel()
        found, wanted = found[near], wanted[near]
    torch.testing.assert_close(found, wanted, **tolerance)


@in_turn(
    by='name',
    name=[n for n, f in FUNCTIONS.items() if f[0].one_code],
    shape=((3, 5, 7, 11), (2, 16, 8, 8), (6, 40), (2, 5, 3)),
    dtype=DTYPES,
    bits=(3, 4),
    channels_last=[False, True],
    parameters=['both', 'weight', 'bias'],
)
def test_normalised_argument(
    name, shape, dtype, bits, channels_last, parameters, device
):
    smooth, _ = FUNCTIONS[name]
    last = channels_last and len(shape) == 4
    x = make(shape, dtype, device, last, 1)
    weight, bias = torch.randn(2, shape[1], device=device).unbind()
    affine = dict(
        weight=None if parameters == 'bias' else weight,
        bias=None if parameters == 'weight' else bias,
    )
    codes, layout = joint(x, bits)
    format = dict(bits=bits, group_size=256, drawn=DRAWN, **affine)
    value, derivative = smooth_reference.smooth_decoded(
        *codes, *layout[:2], smooth, **format
    )
    tolerance = TOLERANCE
    if dtype != torch.float32:
        tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    found = ops.smooth_decode(*codes, *layout, smooth, **format)
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, value.to(dtype), **tolerance)
    grad = torch.empty_like(x).copy_(make(shape, dtype, device).flip(0))
    found = ops.smooth_decode_backward(grad, *codes, smooth, **format)
    wanted = (grad.double() * derivative).to(dtype)
    torch.testing.assert_close(found, wanted, **tolerance)


@in_turn(name=[n for n, f in FUNCTIONS.items() if f[0].one_code])
def test_bias_of_one_code(name):
    smooth, function = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(1)
    x = 1.5 * torch.randn(16, 256, generator=generator)
    exact = function(x.double()), torch_derivative(function, x)
    draws = [], []
    for seed in range(128):
        codes, ranges = ops.quantize(x, 4, seed=seed)
        drawn = DrawnBits.of('dither', seed, 0)
        layout = x.shape, x.stride(), x.dtype
        draws[0].append(
            ops.smooth_decode(codes, ranges, *layout, smooth, 4, drawn=drawn)
        )
        draws[1].append(
            ops.smooth_decode_backward(
                torch.ones_like(x), codes, ranges, smooth, 4, drawn=drawn
            )
        )
    for found, wanted in zip(draws, exact):
        found = torch.stack(found).double()
        one = (found - wanted).square().mean().sqrt()
        mean = (found.mean(0) - wanted).square().mean().sqrt()
        bias = (mean**2 - one**2 / 128).clamp(min=0).sqrt()
        assert bias < 0.1 * one
        # The outputs are of order 1, and 4 bits have 15 steps.
        assert 0.01 < one < 0.15


def test_mask_is_exact(device):
    edges = torch.tensor([3.0, -3.0, math.inf, -math.inf, math.nan, 0.0])
    x = torch.cat([edges, torch.linspace(-4, 4, 1001)]).to(device)
    for name in MASKS:
        smooth, function = FUNCTIONS[name]
        leaf = x.clone().requires_grad_()
        grad = torch.randn_like(x)
        function(leaf).backward(grad)
        codes = ops.smooth_derivative(x, smooth, 1, **RANDOM)
        found = ops.smooth_derivative_backward(
            grad, codes, smooth, 1, drawn=None
        )
        assert torch.equal(found, leaf.grad)


@in_turn(value=[math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(value, device):
    for smooth, function in FUNCTIONS.values():
        x = make((2, 600), torch.float32, device)
        x[1, 7] = value
        wrong = not torch_derivative(function, x)[1, 7].isfinite()
        codes = ops.smooth_derivative(x, smooth, 4, **RANDOM)
        grad = torch.ones_like(x)
        found = ops.smooth_derivative_backward(
            grad, codes, smooth, 4, drawn=DRAWN
        )
        # Of 256 elements, in memory order.
        # Some versions of torch do not show what is not a number.
        assert found.view(-1)[512:768].isnan().all() or not wrong
        assert found.view(-1)[:512].isfinite().all()
        codes, layout = joint(x, 4)
        kept = ops.smooth_decode(*codes, *layout, smooth, 4, drawn=DRAWN)
        expected = function(x)
        assert kept[1, 7].isfinite() == expected[1, 7].isfinite()
        found = ops.smooth_decode_backward(
            grad, *codes, smooth, 4, drawn=DRAWN
        )
        assert found[1, 7].isnan() or not wrong


def test_parts_of_a_payload(device):
    smooth = Smooth.gelu()
    x = make((5, 300), torch.float32, device)
    (codes, ranges), (_, stride, dtype) = joint(x, 4)
    whole = ops.smooth_decode(
        codes, ranges, x.shape, stride, dtype, smooth, 4, drawn=DRAWN
    )
    part = ops.smooth_decode(
        *(codes[2:4], ranges[2:4], (2, 300), stride, dtype, smooth, 4),
        drawn=DRAWN.at_row(2),
    )
    assert torch.equal(part, whole[2:4])


def test_offset_tensor(device):
    smooth = Smooth.silu()
    x = make((3, 300), torch.float32, device)
    moved = torch.tensor([2], device=device)
    codes = ops.smooth_derivative(
        x, smooth, 3, seed=5, offset=1, offset_tensor=moved
    )
    assert torch.equal(codes, ops.smooth_derivative(x, smooth, 3, **RANDOM))
    drawn = DrawnBits(5, 1, moved)
    found, wanted = (
        ops.smooth_derivative_backward(x, codes, smooth, 3, drawn=bits)
        for bits in (drawn, DRAWN)
    )
    assert torch.equal(found, wanted)


def test_pointers_off_the_vector_boundary(device):
    base = make((333,), torch.float16, device)
    smooth = Smooth.gelu()
    for start in range(4):
        x = base[start:]
        codes = ops.smooth_derivative(x, smooth, 4, **RANDOM)
        aligned = ops.smooth_derivative(x.clone(), smooth, 4, **RANDOM)
        assert torch.equal(codes, aligned)
        rows = x.view(1, -1)
        (codes, ranges), layout = joint(rows.clone(), 4)
        found, wanted = (
            ops.smooth_decode_backward(
                g, codes, ranges, smooth, 4, drawn=DRAWN
            )
            for g in (rows, rows.clone())
        )
        assert torch.equal(found, wanted)


def test_opcheck(device):
    mmactnn_ops = torch.ops.mmactnn
    x = torch.randn(3, 5, 7, device=device)
    range_ = -0.13, 1.13, 4
    function = 0, [0.0, 0.0]
    arguments = x, *function, *range_, 1, 2
    opcheck(mmactnn_ops.smooth_derivative.default, arguments)
    codes = mmactnn_ops.smooth_derivative.default(*arguments)
    opcheck(
        mmactnn_ops.smooth_derivative_backward.default,
        (x, codes, *range_, [1, 2, 0, 0]),
    )
    codes, ranges = ops.quantize(x, 4, 64, seed=1)
    format = *function, 4, 64, [1, 0, 0, 0]
    opcheck(
        mmactnn_ops.smooth_decode.default,
        (codes, ranges, x.shape, x.stride(), x.dtype, *format),
    )
    opcheck(
        mmactnn_ops.smooth_decode_backward.default,
        (x, codes, ranges, *format),
    )
    vector = torch.ones(5, device=device)
    opcheck(
        mmactnn_ops.smooth_decode_backward.default,
        (x, codes, ranges, *format, None, vector, vector),
    )


def test_errors(device):
    smooth = Smooth.gelu()
    x = torch.randn(3, 17, device=device)
    codes = ops.smooth_derivative(x, smooth, 4, **RANDOM)
    with pytest.raises(RuntimeError, match='of 29 bytes'):
        ops.smooth_derivative_backward(x, codes[1:], smooth, 4, drawn=None)
    with pytest.raises(ValueError, match='bits must be'):
        ops.smooth_derivative(x, smooth, 9, **RANDOM)
    with pytest.raises(TypeError, match='float64'):
        ops.smooth_derivative(x.double(), smooth, 4, **RANDOM)
    with pytest.raises(RuntimeError, match='function must be from 0 to 10'):
        ops.smooth_derivative(x, smooth._replace(function=11), 4, **RANDOM)
    with pytest.raises(RuntimeError, match='high must exceed low'):
        ops.smooth_derivative(x, smooth._replace(high=-1.0), 4, **RANDOM)
    with pytest.raises(ValueError, match="'none' or 'tanh', got 'erf'"):
        Smooth.gelu('erf')
    (codes, ranges), layout = joint(x, 4)
    with pytest.raises(RuntimeError, match='codes must be of shape'):
        ops.smooth_decode(codes, ranges, *layout, smooth, 3)
    with pytest.raises(RuntimeError, match=r'weight must be .*\[17\]'):
        weight = torch.ones(3, device=device)
        ops.smooth_decode(codes, ranges, *layout, smooth, 4, weight=weight)
