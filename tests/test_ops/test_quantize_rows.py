"""Widths of samples against the uniform ops and the specification."""

import math

import pytest
import torch
from support.opcheck import opcheck
from support.pairs import case, in_turn
from support.roundings import encoding, roundings_of

from mmactnn import ops
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (0, 3, 4),  # no samples
    (9, 0),  # no elements in a sample
    (9, 1),
    (9, 3),  # less than a block of 8
    (9, 64),  # no padding
    (9, 513),  # one element in the last group
    (9, 7, 9, 11),  # nothing divides anything
    (8, 64, 4, 4),  # everything does
)


def make(shape, dtype, device):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * 3
    return x.to(device, dtype)


def make_widths(rows, device, start=0):
    """Every width once, then from the start again, in mixed order."""
    bits = [(start + 3 * n) % 8 + 1 for n in range(rows)]
    row_bits = torch.tensor(bits, dtype=torch.uint8)
    row_starts = row_bits.cumsum(0) - row_bits
    return (
        row_bits.to(device),
        row_starts.to(device, torch.int32),
        sum(bits),
    )


def equal(actual, expected):
    torch.testing.assert_close(
        actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True
    )


def check_against_reference(x, group_size):
    row_bits, row_starts, total = make_widths(x.shape[0], x.device)
    widths = row_bits.cpu(), row_starts.cpu()
    format = (x.shape, x.stride(), x.dtype, group_size)
    for rounding in roundings_of(group_size):
        random = encoding(rounding, -5, 9)
        codes, ranges = ops.quantize_rows(
            x, row_bits, row_starts, total, group_size, **random
        )
        expected = reference.quantize_rows(
            x.cpu(), *widths, total, group_size, **random
        )
        drawn = ops.DrawnBits.of(rounding, -5, 9)
        y = ops.dequantize_rows(
            codes, ranges, row_bits, row_starts, *format, drawn=drawn
        )
        wanted = reference.dequantize_rows(*expected, *widths, *format, drawn)
        with case(rounding=rounding):
            equal(codes, expected[0])
            equal(ranges, expected[1])
            assert y.stride() == x.stride()
            equal(y, wanted)


@in_turn(by='dtype', shape=SHAPES, dtype=DTYPES)
def test_equals_reference_bit_for_bit(shape, dtype, device):
    for group_size in ops.GROUP_SIZES:
        check_against_reference(make(shape, dtype, device), group_size)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_nan_and_inf(dtype, device):
    for shape, group_size in (((9, 7, 50), 64), ((9, 16, 64), 256)):
        x = make(shape, dtype, device)
        x[:, 0, 0], x[:, 1, 30], x[:, -1, -1] = math.inf, math.nan, -math.inf
        x[3] = math.nan
        check_against_reference(x, group_size)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_channels_last_is_read_in_memory_order(dtype, device):
    for shape, group_size in (((9, 10, 7, 5), 64), ((9, 16, 8, 6), 256)):
        x = make(shape, dtype, device)
        x = x.to(memory_format=torch.channels_last)
        check_against_reference(x, group_size)


@in_turn(shape=SHAPES[2:])
def test_each_row_equals_the_uniform_op(shape, device):
    x = make(shape, torch.float32, device)
    row_bits, row_starts, total = make_widths(x.shape[0], device)
    codes, ranges = ops.quantize_rows(
        x, row_bits, row_starts, total, 64, seed=1, offset=2
    )
    y = ops.dequantize_rows(
        codes, ranges, row_bits, row_starts, x.shape, x.stride(), x.dtype, 64
    )
    row_bytes = codes.numel() // total
    for n, (bits, start) in enumerate(
        zip(row_bits.tolist(), row_starts.tolist())
    ):
        whole = ops.quantize(x, bits, 64, seed=1, offset=2)
        mine = codes[start * row_bytes : (start + bits) * row_bytes]
        length = whole[0].shape[1]
        assert torch.equal(mine[:length], whole[0][n])
        assert not mine[length:].any()
        assert torch.equal(ranges[n], whole[1][n])
        expected = ops.dequantize(
            *whole, x.shape, x.stride(), x.dtype, bits, 64
        )
        assert torch.equal(y[n], expected[n])


def test_range_of_samples(device):
    row_bits, row_starts, total = make_widths(9, device, start=4)
    for shape, group_size in (((9, 3, 100), 64), ((9, 8, 64), 256)):
        x = make(shape, torch.float16, device)
        format = (x.stride(), x.dtype, group_size)
        for rounding in roundings_of(group_size):
            codes, ranges = ops.quantize_rows(
                x,
                row_bits,
                row_starts,
                total,
                group_size,
                **encoding(rounding, 4, 0),
            )
            rows = (ranges, row_bits, row_starts)
            drawn = ops.DrawnBits.of(rounding, 4, 0)
            whole = ops.dequantize_rows(
                codes, *rows, shape, *format, drawn=drawn
            )
            part = ops.dequantize_rows(
                codes,
                *(t[2:7] for t in rows),
                (5, *shape[1:]),
                *format,
                drawn=drawn and drawn.at_row(2),
            )
            with case(rounding=rounding, shape=shape):
                assert torch.equal(part, whole[2:7])


def test_rows_need_not_lie_in_order(device):
    x = make((3, 100), torch.float32, device)
    row_bits = torch.tensor([3, 5, 8], dtype=torch.uint8, device=device)
    row_starts = torch.tensor([13, 8, 0], dtype=torch.int32, device=device)
    codes, ranges = ops.quantize_rows(x, row_bits, row_starts, 16, 64, seed=4)
    y = ops.dequantize_rows(
        codes, ranges, row_bits, row_starts, x.shape, x.stride(), x.dtype, 64
    )
    for n, bits in enumerate((3, 5, 8)):
        whole = ops.quantize(x, bits, 64, seed=4)
        expected = ops.dequantize(
            *whole, x.shape, x.stride(), x.dtype, bits, 64
        )
        assert torch.equal(y[n], expected[n])


@in_turn(
    wrong=[
        (0, 0),
        (9, 0),
        (255, 0),
        (4, 13),
        (8, 9),
        (1, 16),
        (4, -1),
        (4, -(2**31)),
    ]
)
def test_rows_that_do_not_fit_are_left_out(wrong, device):
    x = make((3, 100), torch.float32, device)
    good_bits, good_starts = [4, 3, 2], [0, 4, 7]
    row_bits = torch.tensor(good_bits, dtype=torch.uint8, device=device)
    row_starts = torch.tensor(good_starts, dtype=torch.int32, device=device)
    expected = ops.quantize_rows(x, row_bits, row_starts, 16, 64, seed=4)
    format = (x.shape, x.stride(), x.dtype, 64)
    y = ops.dequantize_rows(*expected, row_bits, row_starts, *format)

    row_bits[1], row_starts[1] = wrong
    codes, ranges = ops.quantize_rows(x, row_bits, row_starts, 16, 64, seed=4)
    row_bytes = codes.numel() // 16
    for n in (0, 2):
        begin = good_starts[n] * row_bytes
        end = begin + good_bits[n] * row_bytes
        assert torch.equal(codes[begin:end], expected[0][begin:end])
        assert torch.equal(ranges[n], expected[1][n])
    z = ops.dequantize_rows(codes, ranges, row_bits, row_starts, *format)
    assert torch.equal(z[0], y[0]) and torch.equal(z[2], y[2])


def test_more_rows_than_a_grid_has(device):
    x = torch.arange(70000 * 9, device=device, dtype=torch.float32)
    x = (x % 251).view(70000, 9)
    row_bits, row_starts, total = make_widths(70000, device)
    codes, ranges = ops.quantize_rows(
        x, row_bits, row_starts, total, 64, seed=3
    )
    y = ops.dequantize_rows(
        codes, ranges, row_bits, row_starts, x.shape, x.stride(), x.dtype, 64
    )
    for bits in (3, 8):
        rows = (row_bits == bits).nonzero()[-100:, 0]
        whole = ops.quantize(x, bits, 64, seed=3)
        expected = ops.dequantize(
            *whole, x.shape, x.stride(), x.dtype, bits, 64
        )
        assert torch.equal(y[rows], expected[rows])


@pytest.mark.parametrize('rotated', [False, True])
def test_opcheck(rotated, device):
    x = make((9, 8, 32), torch.float32, device)
    row_bits, row_starts, total = make_widths(9, device)
    arguments = x, row_bits, row_starts, total, 256, 1, 2, None, rotated
    opcheck(torch.ops.mmactnn.quantize_rows.default, arguments)
    codes, ranges = torch.ops.mmactnn.quantize_rows.default(*arguments)
    opcheck(
        torch.ops.mmactnn.dequantize_rows.default,
        (codes, ranges, row_bits, row_starts)
        + (x.shape, x.stride(), x.dtype, 256, [1, 2, 0, int(rotated)]),
    )


@in_turn(total_bits=[1, 17, 8.0, None])
def test_unknown_total_bits(total_bits, device):
    row_bits, row_starts, _ = make_widths(2, device)
    with pytest.raises(ValueError, match=f'2 to 16 .* got {total_bits}'):
        ops.quantize_rows(
            torch.zeros(2, 8, device=device),
            row_bits,
            row_starts,
            total_bits,
            seed=0,
        )


def test_unknown_input(device):
    row_bits, row_starts, total = make_widths(1, device)
    widths = (row_bits, row_starts, total)
    x = torch.zeros(1, 8, device=device)
    with pytest.raises(ValueError, match='512, got 100'):
        ops.quantize_rows(x, *widths, 100, seed=0)
    with pytest.raises(TypeError, match='float64'):
        ops.quantize_rows(x.double(), *widths, seed=0)
    with pytest.raises(ValueError, match='at least one dimension'):
        ops.quantize_rows(x[0, 0], *widths, seed=0)


def test_widths_that_do_not_fit(device):
    x = torch.zeros(2, 8, device=device)
    row_bits, row_starts, total = make_widths(2, device)
    for bits in (row_bits[:1], row_bits.int(), row_bits[:, None]):
        with pytest.raises(RuntimeError, match='row_bits must be .* of 2'):
            ops.quantize_rows(x, bits, row_starts, total, seed=0)
    for starts in (row_starts[:1], row_starts.long()):
        with pytest.raises(RuntimeError, match='row_starts must be .* of 2'):
            ops.quantize_rows(x, row_bits, starts, total, seed=0)


def test_codes_that_do_not_fit(device):
    x = torch.zeros(2, 64, device=device)
    row_bits, row_starts, total = make_widths(2, device)
    codes, ranges = ops.quantize_rows(x, row_bits, row_starts, total, seed=0)
    rows = (ranges, row_bits, row_starts)
    format = (x.shape, x.stride(), x.dtype)
    with pytest.raises(RuntimeError, match='multiple of 8 bytes'):
        ops.dequantize_rows(codes[:-1], *rows, *format)
    with pytest.raises(RuntimeError, match='8-byte boundary'):
        ops.dequantize_rows(codes[1:-7], *rows, *format)
    with pytest.raises(RuntimeError, match='one dimension, got 2'):
        ops.dequantize_rows(codes[None], *rows, *format)
    with pytest.raises(RuntimeError, match=r'ranges must be of shape'):
        ops.dequantize_rows(codes, ranges[:1], *rows[1:], *format)
    with pytest.raises(TypeError, match='float64'):
        ops.dequantize_rows(codes, *rows, *format[:2], torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
class TestCuda:
    """Behaviour that only exists on a GPU."""

    def test_widths_on_another_device(self):
        row_bits, row_starts, total = make_widths(2, 'cpu')
        with pytest.raises(RuntimeError, match='row_bits must be on the dev'):
            ops.quantize_rows(
                torch.zeros(2, 8, device='cuda'),
                row_bits,
                row_starts,
                total,
                seed=0,
            )

    @pytest.mark.skipif(
        torch.cuda.is_available()
        and torch.cuda.get_device_properties(0).total_memory < 24 * 2**30,
        reason='needs 24 GiB of GPU memory',
    )
    def test_more_than_2_31_elements(self):
        row = (2**31 + 4096) // 3
        x = torch.zeros(3, row, dtype=torch.float16, device='cuda')
        tail = torch.randn(1024, device='cuda').half()
        x[-1, -1024:] = tail
        row_bits = torch.tensor([3, 6, 8], dtype=torch.uint8).cuda()
        row_starts = torch.tensor([0, 3, 9], dtype=torch.int32).cuda()
        codes, ranges = ops.quantize_rows(
            x, row_bits, row_starts, 17, 256, seed=1
        )
        y = ops.dequantize_rows(
            codes, ranges, row_bits, row_starts, x.shape, x.stride(), x.dtype
        )
        assert (y[-1, -1024:] - tail).abs().max() < 0.05
        assert not y[:2].any()

    def test_no_synchronisation(self):
        x = torch.randn(8, 4096, device='cuda')
        torch.cuda.set_sync_debug_mode('error')
        try:
            widths = ops.allocate_sample_bits(ops.sample_range_energy(x), 20)
            codes, ranges = ops.quantize_rows(x, *widths, 20, seed=1)
            ops.dequantize_rows(
                codes, ranges, *widths, x.shape, x.stride(), x.dtype
            )
        finally:
            torch.cuda.set_sync_debug_mode('default')
