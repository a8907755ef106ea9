"""Fused normalisation against its specification, and torch's own ops."""

import itertools

import pytest
import torch

from mmactnn import ops
from mmactnn.extension import require_kernels
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of batch norm alone, before a ReLU, and before a residual sum and a ReLU.
MODES = ((False, False), (True, False), (True, True))
SHAPES = (
    (1, 1),
    (3, 5),  # rank 2, less than a block of 8
    (2, 264),  # more than a group, whole blocks
    (2, 5, 3),  # channels shorter than a block
    (2, 7, 7, 5),  # nothing divides anything
    (2, 16, 7, 7),  # blocks across channels
    (2, 24, 14, 14),  # rows aligned, blocks across channels
    (2, 8, 2, 4, 8),  # everything divides everything
)
SPECIAL = (float('inf'), float('-inf'), float('nan'), -0.0)


def make(
    shape, dtype, device, mode=(True, True), last=False, special=False, seed=7
):
    """Arguments of norm_act() up to ``relu``, on the CPU or the GPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    relu, add = mode
    x, residual = normal(*shape) * 3 + 1, normal(*shape)
    # Sums of exactly zero.
    x.view(-1)[::5] = 0.5
    channels = shape[1]
    mean, weight, bias = normal(channels), normal(channels), normal(channels)
    invstd = normal(channels).exp()
    if channels > 1:
        mean[1], bias[1] = 0.5, 0.0
    if special and x.numel() > 3:
        places = torch.arange(len(SPECIAL)) * 3 % x.numel()
        x.view(-1)[places] = torch.tensor(SPECIAL)
        residual.view(-1)[x.numel() // 2] = torch.inf
        residual.view(-1)[-1] = torch.nan
    x, residual = x.to(device, dtype), residual.to(device, dtype)
    if last:
        x = channels_last(x)
        residual = channels_last(residual)
    vectors = (v.to(device) for v in (mean, invstd, weight, bias))
    return x, residual if add else None, *vectors, relu


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def cpu(arguments):
    return [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        torch.testing.assert_close(a.cpu(), e, rtol=0, atol=0, equal_nan=True)


def check(arguments, bits, act_bits, group_size, seed=-5, offset=9):
    """Compare norm_act(), norm_act_() and the decoding of their codes."""
    x, residual, _, _, weight, bias, relu = arguments
    format = (bits, act_bits, group_size)
    expected = reference.norm_act(*cpu(arguments), *format, seed, offset)
    actual = ops.norm_act(*arguments, *format, seed=seed, offset=offset)
    assert_same(actual, expected)
    assert actual[0].stride() == x.stride()
    inplace = x.clone()
    codes = ops.norm_act_(
        inplace, *arguments[1:], *format, seed=seed, offset=offset
    )
    assert_same((inplace, *codes), expected)
    if not relu:
        return
    like = (x.shape, x.stride(), x.dtype)
    if residual is None:
        parameters = (weight, bias)
        y = ops.dequantize_split(
            *actual[1:3], *parameters, *like, bits, group_size
        )
        expected = reference.dequantize_split(
            *expected[1:3], *cpu(parameters), *like, bits, group_size
        )
    else:
        y = ops.dequantize_zeroed(*actual[3:], *like, act_bits, group_size)
        expected = reference.dequantize_zeroed(
            *expected[3:], *like, act_bits, group_size
        )
    assert y.stride() == x.stride()
    assert_same([y], [expected])


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('mode', MODES, ids=str)
def test_equals_reference_bit_for_bit(shape, dtype, mode, device):
    for last, special in itertools.product((False, True), repeat=2):
        arguments = make(shape, dtype, device, mode, last, special)
        for bits, group_size in ((2, 64), (3, 256), (4, 512)):
            check(arguments, bits, bits, group_size)


@pytest.mark.parametrize('mode', MODES, ids=str)
@pytest.mark.parametrize('shape', ((0, 3, 4), (2, 0, 4), (2, 3, 0)), ids=str)
def test_empty_tensors(mode, shape, device):
    relu, add = mode
    x = torch.zeros(shape, device=device)
    vector = torch.zeros(shape[1], device=device)
    arguments = (x, x.clone() if add else None, *[vector] * 4, relu)
    output, codes, ranges, *act = ops.norm_act(*arguments, 3, 4, 64, seed=1)
    assert output.shape == x.shape
    row_numel = 0 if shape[0] == 0 else x[0].numel()
    row_bytes, groups = -(-row_numel // 8), -(-row_numel // 64)
    split = relu and not add
    assert codes.shape == (shape[0], 3 * row_bytes)
    assert ranges.shape == (shape[0], groups, 4 if split else 2)
    if add:
        assert act[0].shape == (shape[0], 4 * row_bytes)
        assert act[1].shape == (shape[0], groups, 2)
    like = (x.shape, x.stride(), x.dtype)
    if split:
        y = ops.dequantize_split(codes, ranges, None, None, *like, 3, 64)
        assert y.shape == x.shape
    elif add:
        assert ops.dequantize_zeroed(*act, *like, 4, 64).shape == x.shape


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('mode', MODES, ids=str)
@pytest.mark.parametrize('special', (False, True))
def test_equals_reference_for_every_width(dtype, mode, special, device):
    for last in (False, True):
        arguments = make((2, 6, 11, 5), dtype, device, mode, last, special)
        for bits in range(2 if mode == (True, False) else 1, 9):
            check(arguments, bits, 10 - max(bits, 2), 128)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_equals_reference_for_every_group_size(dtype, device):
    for mode, group_size in itertools.product(MODES, ops.GROUP_SIZES):
        for last in (False, True):
            arguments = make((2, 16, 9, 8), dtype, device, mode, last)
            check(arguments, 4, 4, group_size)


@pytest.mark.parametrize('mode', MODES, ids=str)
def test_layers_without_weight_or_bias(mode, device):
    for last, shape in itertools.product(
        (False, True), ((2, 16, 8, 8), (2, 5, 3, 3))
    ):
        x, residual, *stats, weight, bias, relu = make(
            shape, torch.float16, device, mode, last, special=True
        )
        for parameters in ((None, None), (weight, None), (None, bias)):
            check((x, residual, *stats, *parameters, relu), 3, 3, 64)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_storage_off_the_boundary(dtype, device):
    for mode in MODES:
        x, residual, *rest = make((2, 16, 4, 8), dtype, device, mode)
        shifted = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        check((shifted, residual, *rest), 4, 4, 64)
        if residual is not None:
            moved = x.new_empty(x.numel() + 1)[1:].view(x.shape)
            check((x, moved.copy_(residual), *rest), 4, 4, 64)
        vectors = [v.new_empty(17)[1:].copy_(v) for v in rest[:4]]
        last = [
            channels_last(t) if t is not None else t for t in (x, residual)
        ]
        check((*last, *vectors, rest[4]), 4, 4, 64)


def test_plain_codes_are_those_of_quantize(device):
    arguments = make((2, 6, 10, 10), torch.float32, device, (False, False))
    x, _, mean, invstd, *_ = arguments
    normal = (x - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)
    expected = ops.quantize(normal, 4, 128, seed=3, offset=2)
    actual = ops.norm_act(*arguments, 4, 0, 128, seed=3, offset=2)
    assert torch.equal(actual[1], expected[0])
    assert torch.equal(actual[2], expected[1])
    assert actual[3].numel() == actual[4].numel() == 0


@pytest.mark.parametrize('mode', MODES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_output_is_that_of_torch(mode, dtype, device):
    x, residual, mean, invstd, weight, bias, relu = make(
        (3, 16, 7, 7), dtype, device, mode
    )
    expected = torch.nn.functional.batch_norm(
        x.double(),
        mean.double(),
        invstd.double() ** -2,
        weight.double(),
        bias.double(),
        eps=0.0,
    )
    if residual is not None:
        expected = expected + residual.double()
    expected = expected.relu() if relu else expected
    arguments = (x, residual, mean, invstd, weight, bias, relu)
    output = ops.norm_act(*arguments, 4, 4, seed=1)[0]
    torch.testing.assert_close(
        output.double(),
        expected,
        rtol=4 * torch.finfo(dtype).eps,
        atol=1e-4,
    )


@pytest.mark.parametrize('bits', (2, 4))
def test_signs_survive_and_values_are_within_a_step(bits, device):
    arguments = make((2, 16, 8, 8), torch.float32, device, (True, False))
    x, _, _, _, weight, bias, _ = arguments
    output, codes, ranges, *_ = ops.norm_act(*arguments, bits, 0, 64, seed=1)
    y = ops.dequantize_split(
        codes, ranges, weight, bias, x.shape, x.stride(), x.dtype, bits, 64
    )
    assert (y[output == 0] == 0).all()
    step = ranges[..., 3].float().repeat_interleave(64, 1).view(x.shape)
    limit = step * weight.abs().view(-1, 1, 1) + 1e-5
    assert ((y - output).abs() <= limit).all()


def test_zeroed_codes_keep_zeros(device):
    arguments = make((2, 16, 8, 8), torch.float32, device, (True, True))
    x = arguments[0]
    output, *_, codes, ranges = ops.norm_act(*arguments, 2, 3, 64, seed=1)
    y = ops.dequantize_zeroed(
        codes, ranges, x.shape, x.stride(), x.dtype, 3, 64
    )
    assert torch.equal(y == 0, output == 0)
    step = ranges[..., 1].float().repeat_interleave(64, 1).view(x.shape)
    assert ((y - output).abs() <= step + 1e-5).all()


@pytest.mark.parametrize('zeroed', (False, True))
def test_rounding_is_unbiased(zeroed, device):
    draws = 4096
    arguments = make((1, 4, 64), torch.float32, device, (True, zeroed))
    x, residual, *rest = arguments
    x = x.expand(draws, 4, 64).contiguous()
    if zeroed:
        residual = residual.expand(draws, 4, 64).contiguous()
    output, codes, ranges, *act = ops.norm_act(
        x, residual, *rest, 3, 3, seed=11
    )
    like = (x.shape, x.stride(), x.dtype, 3)
    if zeroed:
        y, step = ops.dequantize_zeroed(*act, *like), act[1][0, 0, 1]
    else:
        y = ops.dequantize_split(codes, ranges, *rest[2:4], *like)
        step = ranges[0, 0, 3] * rest[2].abs().max()
    error = (y.double() - output.double()).mean(0)
    # Five standard deviations of the mean of at most half a step each.
    assert (error.abs() <= 2.5 * float(step) / draws**0.5 + 1e-5).all()


def test_float16_is_rectified_as_it_is_stored(device):
    # Half of the smallest number is a tie that goes to zero; more is not.
    tie = 2.0**-25
    x = torch.tensor([[tie, tie * 1.001, -tie, 2 * tie]], device=device)
    zeros, ones = torch.zeros(4, device=device), torch.ones(4, device=device)
    bias = x[0].contiguous()
    half = torch.zeros(1, 4, device=device, dtype=torch.float16)
    check((half, None, zeros, ones, None, bias, True), 2, 2, 64)
    output = ops.norm_act(
        half, None, zeros, ones, None, bias, True, 2, 2, seed=1
    )[0]
    assert (output > 0).tolist() == [[False, True, False, True]]


def test_values_beyond_the_dtype(device):
    # Outputs overflow float16 while normalised values are finite.
    x, residual, mean, invstd, weight, bias, relu = make(
        (2, 8, 8, 8), torch.float16, device, (True, True)
    )
    for add in (None, residual):
        check((x, add, mean, invstd, weight * 3e4, bias, relu), 4, 4, 64)
        check((x, add, mean, invstd * 1e38, weight, bias, relu), 4, 4, 64)


@pytest.mark.parametrize('zeroed', (False, True))
def test_range_of_samples(zeroed, device):
    arguments = make((5, 6, 9), torch.float16, device, (True, zeroed))
    x, _, _, _, weight, bias, _ = arguments
    result = ops.norm_act(*arguments, 4, 4, 64, seed=4)
    codes, ranges = result[3:] if zeroed else result[1:3]

    def decode(first, last):
        part = codes[first:last], ranges[first:last]
        like = ((last - first, 6, 9), x.stride(), x.dtype, 4, 64)
        if zeroed:
            return ops.dequantize_zeroed(*part, *like)
        return ops.dequantize_split(*part, weight, bias, *like)

    assert torch.equal(decode(1, 4), decode(0, 5)[1:4])


def test_other_layouts_are_copied(device):
    arguments = make((4, 8, 6, 10), torch.float32, device, (True, True))
    x, residual, *rest = arguments
    expected = ops.norm_act(*arguments, 4, 4, seed=1)
    actual = ops.norm_act(
        x.mT.contiguous().mT, channels_last(residual), *rest, 4, 4, seed=1
    )
    assert_same(actual, cpu(expected))
    with pytest.raises(RuntimeError, match=r'strides \[480, 60, 1, 6\]'):
        ops.norm_act_(x.mT.contiguous().mT, None, *rest, 4, 4, seed=1)


def test_residual_may_not_overlap_in_place(device):
    x, _, *rest = make((2, 8, 6), torch.float32, device)
    with pytest.raises(RuntimeError, match='overlap'):
        ops.norm_act_(x, x, *rest, 4, 4, seed=1)
    base = torch.zeros(3, 8, 6, device=device)
    with pytest.raises(RuntimeError, match='overlap'):
        ops.norm_act_(base[1:], base[:2], *rest, 4, 4, seed=1)
    ops.norm_act(x, x, *rest, 4, 4, seed=1)


def test_errors_name_what_is_wrong(device):
    x, residual, mean, invstd, weight, bias, _ = make(
        (2, 8, 6), torch.float32, device
    )
    vectors = (mean, invstd, weight, bias)

    def call(x=x, residual=None, vectors=vectors, relu=True, format=(4, 4)):
        ops.norm_act(x, residual, *vectors, relu, *format, seed=1)

    with pytest.raises(ValueError, match='relu must be True'):
        call(residual=residual, relu=False)
    with pytest.raises(ValueError, match='bits must be .* 2 to 8.* got 1'):
        call(format=(1, 4))
    with pytest.raises(ValueError, match='bits must be .* 1 to 8, got 9'):
        call(format=(9, 4))
    with pytest.raises(ValueError, match='act_bits must be .* got 1'):
        call(residual=residual, format=(4, 1))
    with pytest.raises(ValueError, match='group_size'):
        call(format=(4, 4, 100))
    with pytest.raises(ValueError, match='2 to 5 dimensions'):
        call(x=x[0, 0])
    with pytest.raises(ValueError, match=r'residual .* got \(2, 8, 5\)'):
        call(residual=residual[..., :5])
    with pytest.raises(TypeError, match='residual must be of the dtype'):
        call(residual=residual.half())
    with pytest.raises(ValueError, match=r'mean .* \(8,\).* got \(7,\)'):
        call(vectors=(mean[:7], *vectors[1:]))
    with pytest.raises(TypeError, match='weight must be float32'):
        call(vectors=(mean, invstd, weight.double(), bias))
    with pytest.raises(RuntimeError, match='invstd must be a contiguous'):
        call(vectors=(mean, invstd.repeat(2)[::2], weight, bias))
    with pytest.raises(TypeError, match='float64'):
        call(x=x.double())


def test_errors_of_decoding(device):
    arguments = make((2, 8, 6), torch.float32, device, (True, False))
    x, _, _, _, weight, bias, _ = arguments
    codes, ranges = ops.norm_act(*arguments, 4, 4, seed=1)[1:3]
    like = (x.shape, x.stride())

    def decode(*rest, codes=codes, ranges=ranges, weight=weight, like=like):
        return ops.dequantize_split(codes, ranges, weight, bias, *like, *rest)

    with pytest.raises(ValueError, match='2 to 8.*got 1'):
        decode(x.dtype, 1)
    with pytest.raises(TypeError, match='float64'):
        decode(torch.float64, 4)
    with pytest.raises(RuntimeError, match='codes must be of shape'):
        decode(x.dtype, 3)
    with pytest.raises(RuntimeError, match='ranges must be'):
        decode(x.dtype, 4, ranges=ranges[..., :2].contiguous())
    with pytest.raises(RuntimeError, match='weight must be'):
        decode(x.dtype, 4, weight=weight[:5])
    with pytest.raises(RuntimeError, match='strides'):
        decode(x.dtype, 4, like=((2, 2, 6, 4), (48, 24, 1, 6)))
    with pytest.raises(RuntimeError, match='ranges must be'):
        ops.dequantize_zeroed(codes, ranges, *like, x.dtype, 4)


@pytest.mark.parametrize('mode', MODES, ids=str)
@pytest.mark.parametrize('last', (False, True))
def test_opcheck(mode, last, device):
    require_kernels(device)
    arguments = make((2, 8, 5, 3), torch.float32, device, mode, last)
    x, residual, *_, weight, bias, relu = arguments
    format = (4, 3, 64, 1, 0)
    torch.library.opcheck(torch.ops.mmactnn.norm_act, (*arguments, *format))
    torch.library.opcheck(torch.ops.mmactnn.norm_act_, (*arguments, *format))
    if not relu:
        return
    _, codes, ranges, *act = ops.norm_act(*arguments, 4, 3, 64, seed=1)
    like = (list(x.shape), list(x.stride()), x.dtype)
    if residual is None:
        torch.library.opcheck(
            torch.ops.mmactnn.dequantize_split,
            (codes, ranges, weight, bias, *like, 4, 64),
        )
    else:
        torch.library.opcheck(
            torch.ops.mmactnn.dequantize_zeroed, (*act, *like, 3, 64)
        )
