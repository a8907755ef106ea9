"""Quantise and dequantise against their specification and closed forms."""

import itertools
import math

import pytest
import torch
from support.opcheck import opcheck
from support.pairs import case, pairs
from support.roundings import encoding, roundings_of

from mmactnn import ops
from mmactnn.extension import require_kernels
from mmactnn.ops import philox_reference, reference
from mmactnn.random import mix64

BITS = tuple(range(1, 9))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (0, 3, 4),  # no samples
    (4, 0),  # no elements in a sample
    (1,),
    (5, 3),  # less than a block of 8
    (2, 256),  # exactly one group
    (3, 513),  # one element in the last group
    (2, 7, 9, 11),  # nothing divides anything
    (2, 64, 8, 8),  # everything does
)


def make(shape, dtype, device, channels_last=False, special=None):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * 3
    if special is not None and x.numel() > 3:
        flat = x.view(-1)
        flat[0], flat[x.numel() // 2], flat[-1] = special
    x = x.to(device, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x


def round_trip(x, bits, group_size=256, seed=3, offset=0):
    codes, ranges = ops.quantize(x, bits, group_size, seed=seed, offset=offset)
    return ops.dequantize(
        codes, ranges, x.shape, x.stride(), x.dtype, bits, group_size
    )


def assert_equal_with_nan(actual, expected):
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_equals_reference_bit_for_bit(shape, device):
    for row in pairs(bits=BITS, group_size=ops.GROUP_SIZES, dtype=DTYPES):
        with case(**row):
            x = make(shape, row.pop('dtype'), device)
            assert_equal_to_reference(x, **row)


def assert_equal_to_reference(x, bits, group_size):
    format = x.shape, x.stride(), x.dtype, bits, group_size
    for rounding in roundings_of(group_size):
        random = encoding(rounding, -5, 9)
        codes, ranges = ops.quantize(x, bits, group_size, **random)
        expected = reference.quantize(x.cpu(), bits, group_size, **random)
        drawn = ops.DrawnBits.of(rounding, -5, 9)
        y = ops.dequantize(codes, ranges, *format, drawn=drawn)
        wanted = reference.dequantize(*expected, *format, drawn)
        with case(rounding=rounding):
            assert_equal_with_nan(codes.cpu(), expected[0])
            assert_equal_with_nan(ranges.cpu(), expected[1])
            assert y.stride() == x.stride()
            assert_equal_with_nan(y.cpu(), wanted)


def test_philox_equals_published_vectors():
    # Random123's known answers for philox4x32 with 7 rounds, all-zero and
    # all-one inputs and the digits of pi.
    zeros = philox_reference.philox(torch.tensor([0]), 0, 0)
    assert zeros.tolist() == [[0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]]
    ones = philox_reference.philox(torch.tensor([-1]), 2**64 - 1, 2**64 - 1)
    assert ones.tolist() == [[0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]]

    def pair(low, high, key):
        counter = torch.tensor([low]), torch.tensor([high])
        return philox_reference.philox_pair(counter, key).tolist()[0]

    # The same for philox2x32.
    full = 2**32 - 1
    assert pair(0, 0, 0) == [0x257A3673, 0xCD26BE2A]
    assert pair(full, full, full) == [0xAB302C4D, 0x3DC9D239]
    pi = pair(0x243F6A88, 0x85A308D3, 0x13198A2E)
    assert pi == [0xBEDBBE6B, 0xE4C770B3]


def test_splitmix_equals_published_numbers():
    # The first outputs of Java's SplittableRandom from the seed 0.
    golden = 0x9E3779B97F4A7C15
    states = [golden * n & 2**64 - 1 for n in (1, 2, 3)]
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix64(state) for state in states] == expected


def test_channels_last_is_read_in_memory_order(device):
    x = make((3, 10, 7, 5), torch.float32, device, channels_last=True)
    # The same numbers as a contiguous tensor give the same codes.
    twin = x.permute(0, 2, 3, 1)
    assert twin.is_contiguous()
    layout = x.shape, x.stride(), x.dtype
    for bits in BITS:
        codes, ranges = ops.quantize(x, bits, seed=1)
        expected = ops.quantize(twin, bits, seed=1)
        y = ops.dequantize(codes, ranges, *layout, bits)
        with case(bits=bits):
            assert torch.equal(codes, expected[0])
            assert torch.equal(ranges, expected[1])
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_channels_last_equals_reference(dtype, device):
    for bits in BITS:
        for shape in ((3, 10, 7, 5), (3, 16, 8, 6)):
            x = make(shape, dtype, device, channels_last=True)
            with case(bits=bits, shape=shape):
                assert_equal_to_reference(x, bits, 256)


def test_layouts_that_are_not_dense_rows_are_copied(device):
    base = make((6, 8, 40), torch.float32, device)
    for view in (base[:, :, ::2], base[:, 1:5], base.transpose(0, 1)):
        codes, ranges = ops.quantize(view, 4, 64, seed=2)
        expected = ops.quantize(view.contiguous(), 4, 64, seed=2)
        assert torch.equal(codes, expected[0])
        assert torch.equal(ranges, expected[1])


@pytest.mark.parametrize(
    ('shape', 'group_size'), [((5, 3, 100), 64), ((5, 8, 96), 256)]
)
def test_range_of_samples(shape, group_size, device):
    x = make(shape, torch.float16, device)
    layout = x.stride(), x.dtype
    for rounding in roundings_of(group_size):
        random = encoding(rounding, 4, 0)
        drawn = ops.DrawnBits.of(rounding, 4, 0)
        for bits in BITS:
            codes, ranges = ops.quantize(x, bits, group_size, **random)
            whole = ops.dequantize(
                codes, ranges, shape, *layout, bits, group_size, drawn=drawn
            )
            part = ops.dequantize(
                codes[1:4],
                ranges[1:4],
                (3, *shape[1:]),
                *layout,
                bits,
                group_size,
                drawn=drawn and drawn.at_row(1),
            )
            with case(rounding=rounding, bits=bits):
                assert torch.equal(part, whole[1:4])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_error_is_less_than_a_step(dtype, device):
    x = make((4, 1000), dtype, device)
    groups = torch.nn.functional.pad(
        x.float(), (0, 24), mode='replicate'
    ).view(4, -1, 64)
    spread = groups.amax(-1) - groups.amin(-1)
    # bfloat16 ranges grow outwards by 2^-7 of the low end and of the step.
    scale = (spread + groups.abs().amax(-1) / 128) * (1 + 1 / 128)
    rounding = torch.finfo(dtype).eps * x.float().abs().amax()
    for bits in BITS:
        error = (round_trip(x, bits, 64).float() - x.float()).abs()
        step = scale / (2**bits - 1)
        limit = step.repeat_interleave(64, dim=1)[:, :1000]
        assert (error <= limit + rounding).all(), bits


@pytest.mark.parametrize('bits', BITS)
def test_rounding_is_unbiased_with_the_variance_of_the_closed_form(
    bits, device
):
    draws = 4096
    x = make((1, 256), torch.float32, device)
    samples = x.expand(draws, 256).contiguous()
    codes, ranges = ops.quantize(samples, bits, seed=11)
    assert torch.equal(ranges, ranges[:1].expand_as(ranges))
    y = ops.dequantize(
        codes, ranges, samples.shape, samples.stride(), x.dtype, bits
    ).double()

    low, step = ranges[0, 0].double().tolist()
    position = (x[0].double() - low) / step
    fraction = position - position.floor()
    variance = step**2 * fraction * (1 - fraction)
    deviation = (variance / draws).sqrt() + 1e-12
    z = (y.mean(0) - x[0].double()) / deviation
    # 16 random bits, but 15 for codes of 8: a fraction is off by at most half
    # of the last.
    resolution = step * 2 ** -(16.0 if bits == 8 else 17.0) / deviation
    assert (z.abs() <= 5 + resolution).all()
    assert z[fraction > 0.01].pow(2).mean() < 1.3

    # The sample variance of a two-point law has a known spread, too.
    sampled = y.var(0)
    kurtosis = variance * (step**2 - 3 * variance) - variance**2
    spread = ((kurtosis + 2 * variance**2).clamp(min=0) / draws).sqrt()
    assert ((sampled - variance).abs() <= 6 * spread + 1e-4 * step**2).all()


class TestDither:
    """Decoding with the random bits that values were rounded with."""

    @pytest.mark.parametrize('bits', BITS)
    def test_errors_are_uniform_whatever_the_value(self, bits, device):
        draws = 4096
        x = make((1, 256), torch.float32, device)
        samples = x.expand(draws, 256).contiguous()
        codes, ranges = ops.quantize(samples, bits, seed=11)
        layout = samples.shape, samples.stride(), x.dtype, bits
        y = ops.dequantize(codes, ranges, *layout, drawn=ops.DrawnBits(11, 0))
        step = ranges[0, 0, 1].double()
        # In steps: uniform on [-1/2, 1/2], but for rounding to float32.
        errors = (y.double() - x.double()) / step
        resolution = 2.0**-15 + float(3 * 2.0**-24 * x.abs().max() / step)
        assert errors.abs().max() <= 0.5 + resolution
        # Means of elements, whose bias is below the bits of u.
        deviation = (1 / 12 / draws) ** 0.5
        z = errors.mean(0).abs() / deviation
        assert (z <= 5 + resolution / deviation).all()
        # The fourth central moment of the law is 1/80.
        spread = ((1 / 80 - 1 / 144) / draws) ** 0.5
        assert ((errors.var(0) - 1 / 12).abs() <= 5 * spread).all()
        # The law itself, by its largest distance from the uniform one
        # (Kolmogorov), for 64 elements.
        ordered = errors[:, :64].sort(0).values + 0.5
        places = torch.arange(1, draws + 1, device=device) / draws
        distance = (ordered - places[:, None]).abs().amax(0) * draws**0.5
        # P(distance > 2.2) is 1e-4.
        assert distance.max() < 2.2

    def test_errors_of_elements_and_draws_are_uncorrelated(self, device):
        x = torch.linspace(-1, 1, 256, device=device).expand(2048, 256)

        def errors(seed, offset):
            codes, ranges = ops.quantize(x, 2, seed=seed, offset=offset)
            drawn = ops.DrawnBits(seed, offset)
            layout = x.shape, (256, 1), x.dtype, 2
            y = ops.dequantize(codes, ranges, *layout, drawn=drawn)
            return (y - x).double() / ranges[0, 0, 1].double() * 12**0.5

        found = errors(1, 0)
        count = len(found)
        correlation = found.T @ found / count
        off = correlation[~torch.eye(256, dtype=torch.bool, device=device)]
        assert off.abs().max() < 6 / math.sqrt(count)
        # Neighbours share 8 of their 16 bits, the higher ones of one of them.
        assert off.pow(2).mean().item() == pytest.approx(1 / count, rel=0.1)
        for other in (errors(1, 1), errors(2, 0), errors(1, 1 << 63)):
            correlated = (found * other).mean().abs()
            assert correlated < 6 / math.sqrt(found.numel())

    def test_groups_that_begin_with_zero_are_exact_there(self, device):
        x = make((3, 512), torch.float32, device).relu()
        x[1, :256] -= 1
        for bits in BITS:
            codes, ranges = ops.quantize(x, bits, seed=1)
            layout = x.shape, x.stride(), x.dtype, bits
            plain = ops.dequantize(codes, ranges, *layout)
            y = ops.dequantize(
                codes, ranges, *layout, drawn=ops.DrawnBits(1, 0)
            )
            same = torch.ones(3, 2, dtype=torch.bool, device=device)
            same[1, 0] = False
            groups = (y == plain).view(3, 2, 256)
            with case(bits=bits):
                assert torch.equal(groups.all(-1), same)
                assert groups[1, 0].float().mean() < 0.1
                assert not y[0][x[0] == 0].any()

    @pytest.mark.parametrize('value', [0.0, 1.0, -2.5])
    def test_constant_groups_are_exact(self, value, device):
        x = torch.full((2, 300), value, device=device)
        for bits in BITS:
            codes, ranges = ops.quantize(x, bits, seed=1)
            layout = x.shape, x.stride(), x.dtype, bits
            y = ops.dequantize(
                codes, ranges, *layout, drawn=ops.DrawnBits(1, 0)
            )
            assert torch.equal(y, x), bits

    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_largest_numbers_stay_finite(self, dtype, device):
        largest = torch.finfo(dtype).max
        x = torch.full((8, 64), largest, dtype=dtype, device=device)
        x[:, 0] = largest / 2
        # The lowest number of float32 lies in no range of bfloat16.
        signs = (1,) if dtype == torch.float32 else (1, -1)
        for bits, sign in itertools.product(BITS, signs):
            codes, ranges = ops.quantize(sign * x, bits, 64, seed=1)
            layout = x.shape, x.stride(), dtype, bits, 64
            y = ops.dequantize(
                codes, ranges, *layout, drawn=ops.DrawnBits(1, 0)
            )
            expected = reference.dequantize(
                codes.cpu(), ranges.cpu(), *layout, ops.DrawnBits(1, 0)
            )
            with case(bits=bits, sign=sign):
                assert y.isfinite().all()
                assert torch.equal(y.cpu(), expected)

    def test_invalid_arguments(self, device):
        x = torch.zeros(2, 64, device=device)
        codes, ranges = ops.quantize(x, 2, seed=0)
        layout = x.shape, x.stride(), x.dtype, 2
        with pytest.raises(RuntimeError, match='drawn must be empty, or'):
            drawn = ops.DrawnBits(0, 0, None, -1)
            ops.dequantize(codes, ranges, *layout, drawn=drawn)
        with pytest.raises(RuntimeError, match='got 2 numbers'):
            torch.ops.mmactnn.dequantize(codes, ranges, *layout, 256, [1, 2])


def test_rounding_of_elements_and_draws_is_independent(device):
    x = torch.full((512, 256), 0.5, device=device)
    x[:, 0], x[:, 1] = 0, 1
    noise = round_trip(x, 1)[:, 2:] - 0.5
    assert noise.unique().tolist() == [-0.5, 0.5]
    noise = noise.double() * 2
    count = noise.shape[0]
    # Correlations of 254 elements over 512 samples: N(0, 1 / 512) off the
    # diagonal.
    correlation = noise.T @ noise / count
    off = correlation[~torch.eye(254, dtype=torch.bool, device=device)]
    assert off.abs().max() < 6 / math.sqrt(count)
    assert off.pow(2).mean().item() == pytest.approx(1 / count, rel=0.1)
    again = round_trip(x, 1, offset=1)[:, 2:].double() * 2 - 1
    assert (noise * again).mean().abs() < 6 / math.sqrt(noise.numel())


def test_codes_are_packed_from_the_lowest_bits_on(device):
    for bits in BITS:
        levels = 2**bits - 1
        codes = [0, levels, levels // 2, 1, levels, 0, levels // 3, levels]
        # A range of 0 to levels, and so a step of 1: nothing is rounded.
        x = torch.tensor([codes], dtype=torch.float32, device=device)
        packed = ops.quantize(x, bits, seed=1)[0]
        word = sum(code << (i * bits) for i, code in enumerate(codes))
        expected = list(word.to_bytes(bits, 'little'))
        assert packed.tolist() == [expected], bits


def test_seed_and_offset_decide(device):
    x = make((2, 300), torch.float32, device)
    first = ops.quantize(x, 2, seed=1, offset=2)[0]
    assert torch.equal(first, ops.quantize(x, 2, seed=1, offset=2)[0])
    assert not torch.equal(first, ops.quantize(x, 2, seed=2, offset=2)[0])
    assert not torch.equal(first, ops.quantize(x, 2, seed=1, offset=3)[0])
    high = ops.quantize(x, 2, seed=1, offset=2 + (1 << 40))[0]
    assert not torch.equal(first, high)


@pytest.mark.parametrize('value', [0.0, 1.0, -2.5, 1e-40, 3.14159])
def test_constant_groups(value, device):
    x = torch.full((2, 300), value, device=device)
    for bits in BITS:
        y = round_trip(x, bits)
        if value in (0.0, 1.0, -2.5):  # bfloat16 numbers
            assert torch.equal(y, x), bits
        else:
            assert (y - x).abs().max() <= abs(value) / 64 + 1e-33, bits


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_nan_and_inf_keep_their_places(dtype, device):
    inf, nan = math.inf, math.nan
    for special in ((inf, -inf, nan), (inf, inf, inf), (nan, 1.0, 2.0)):
        x = make((3, 7, 50), dtype, device, special=special)
        for bits in BITS[1:]:
            y = round_trip(x, bits, 64)
            with case(special=special, bits=bits):
                assert torch.equal(x.isnan(), y.isnan())
                assert torch.equal(x == inf, y == inf)
                assert torch.equal(x == -inf, y == -inf)
                assert_equal_to_reference(x, bits, 64)


def test_nan_and_inf_are_nan_at_one_bit(device):
    x = make((2, 300), torch.float32, device, special=(math.inf, 0, math.nan))
    assert torch.equal(round_trip(x, 1).isnan(), ~x.isfinite())


def test_only_the_group_with_nan_suffers(device):
    x = make((1, 512), torch.float32, device)
    y = round_trip(x, 8)
    x[0, 3] = math.nan
    assert torch.equal(round_trip(x, 8)[0, 256:], y[0, 256:])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_largest_numbers_stay_finite_or_turn_nan(dtype, device):
    largest = torch.finfo(dtype).max
    for bits in BITS:
        x = torch.full((1, 64), largest, dtype=dtype, device=device)
        x[0, 0] = largest / 2
        assert round_trip(x, bits, 64).isfinite().all(), bits
        x[0, 0] = -largest
        y = round_trip(x, bits, 64)
        if dtype == torch.float16:  # in reach of a bfloat16 step
            assert y.isfinite().all(), bits
        else:
            assert y.isnan().all(), bits


def test_smallest_numbers(device):
    x = torch.linspace(0, 1e-38, 64, device=device).view(1, -1)
    for bits in BITS:
        y = round_trip(x, bits, 64)
        with case(bits=bits):
            assert y.isfinite().all() and y.amin() >= 0
            assert y.amax() <= 2.0**-111


def test_more_rows_than_a_grid_has(device):
    x = torch.arange(70000 * 9, device=device, dtype=torch.float32)
    x = (x % 251).view(70000, 9)
    y = round_trip(x, 8, 64)
    step = (x.amax(1) - x.amin(1)) / 255 * 1.02 + x.amin(1) / 128
    assert ((y - x).abs() <= step[:, None] + 0.01).all()


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('bits', [1, 3, 8])
def test_opcheck(bits, rotated, device):
    x = make((3, 8, 32), torch.float32, device)
    random = 1, 2, None, rotated
    opcheck(torch.ops.mmactnn.quantize.default, (x, bits, 256, *random))
    codes, ranges = ops.quantize(x, bits, seed=1, offset=2, rotated=rotated)
    layout = x.shape, x.stride(), x.dtype
    opcheck(
        torch.ops.mmactnn.dequantize.default,
        (codes, ranges, *layout, bits, 256, [1, 2, 0, int(rotated)]),
    )


def test_sizes(device):
    codes, ranges = ops.quantize(
        torch.zeros(3, 1001, device=device), 2, 256, seed=0
    )
    assert codes.shape == (3, 252) and codes.dtype == torch.uint8
    assert ranges.shape == (3, 4, 2) and ranges.dtype == torch.bfloat16


def test_unknown_bits():
    for bits in (0, 9, 16, 2.5):
        with pytest.raises(ValueError, match=f'from 1 to 8, got {bits}'):
            ops.quantize(torch.zeros(1, 8), bits, seed=0)


def test_unknown_group_size():
    for group_size in (0, 32, 100, 1024):
        with pytest.raises(ValueError, match=f'512, got {group_size}'):
            ops.quantize(torch.zeros(1, 8), 2, group_size, seed=0)


def test_unknown_dtype(device):
    with pytest.raises(TypeError, match='float64'):
        ops.quantize(
            torch.zeros(1, 8, dtype=torch.float64, device=device), 2, seed=0
        )


def test_scalar(device):
    with pytest.raises(ValueError, match='at least one dimension'):
        ops.quantize(torch.tensor(1.0, device=device), 2, seed=0)


def test_device_without_kernels():
    with pytest.raises(RuntimeError, match='no kernels for tensors on mps:0'):
        require_kernels(torch.device('mps', 0))


def test_codes_that_do_not_fit(device):
    codes, ranges = ops.quantize(torch.zeros(2, 64, device=device), 2, seed=0)
    with pytest.raises(RuntimeError, match=r'codes must be of shape'):
        ops.dequantize(codes, ranges, (2, 72), (72, 1), torch.float32, 2)
    with pytest.raises(RuntimeError, match=r'ranges must be of shape'):
        ops.dequantize(
            codes, ranges[:, :0], (2, 64), (64, 1), torch.float32, 2
        )
    with pytest.raises(RuntimeError, match='must be dense in memory'):
        ops.dequantize(codes, ranges, (2, 64), (128, 2), torch.float32, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
class TestCuda:
    """Behaviour that only exists on a GPU."""

    def test_side_stream(self):
        x = torch.randn(64, 4096, device='cuda')
        expected = round_trip(x, 2)
        stream = torch.cuda.Stream()
        filled = torch.zeros_like(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # Long enough that kernels on another stream would run first.
            torch.cuda._sleep(50_000_000)
            filled.copy_(x)
            y = round_trip(filled, 2)
        stream.synchronize()
        assert torch.equal(y, expected)

    @pytest.mark.skipif(
        torch.cuda.is_available()
        and torch.cuda.get_device_properties(0).total_memory < 24 * 2**30,
        reason='needs 24 GiB of GPU memory',
    )
    @pytest.mark.parametrize('rows', [1, 3])
    def test_more_than_2_31_elements(self, rows):
        row = (2**31 + 4096) // rows
        x = torch.zeros(rows, row, dtype=torch.float16, device='cuda')
        tail = torch.randn(1024, device='cuda').half()
        x[-1, -1024:] = tail
        y = round_trip(x, 8)
        assert (y[-1, -1024:] - tail).abs().max() < 0.05
        assert not y[0, :1024].any()

    def test_no_synchronisation(self):
        x = torch.randn(8, 4096, device='cuda')
        round_trip(x, 2)
        torch.cuda.set_sync_debug_mode('error')
        try:
            round_trip(x, 2)
            ops.relu_mask(x)
        finally:
            torch.cuda.set_sync_debug_mode('default')
