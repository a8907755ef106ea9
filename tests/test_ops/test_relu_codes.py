"""ReLU with codes of its output, against its specification and torch."""

import math

import pytest
import torch
from support.layers import assert_same_bits
from support.opcheck import opcheck
from support.pairs import case, in_turn, pairs
from support.roundings import encoding, roundings_of

from mmactnn import ops
from mmactnn.ops import reference

BITS = tuple(range(2, 9))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (0, 3, 4),  # no samples
    (4, 0),  # no elements in a sample
    (1,),
    (5, 3),  # less than a block of 8
    (2, 256),  # exactly one group
    (3, 513),  # one element in the last group
    (2, 1028),  # the last block of an aligned row is not full
    (2, 7, 9, 11),  # nothing divides anything
    (2, 64, 8, 8),  # everything does
)
INF, NAN = math.inf, math.nan
SPECIAL = {
    'finite': (),
    'nan': (NAN,),
    'inf': (INF,),
    'all': (NAN, INF, -INF, 0.0, -0.0, 1.0),
    'negative inf': (-INF, -0.0),
}


def make(shape, dtype, device, special=(), channels_last=False):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * 3
    if x.numel() > len(special):
        # Far apart, so that some groups have one of them and others none.
        places = torch.linspace(0, x.numel() - 1, len(special)).long()
        x.view(-1)[places] = torch.tensor(special)
    x = x.to(device, dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x


def decode(codes, ranges, like, bits, group_size):
    return ops.dequantize_zeroed(
        codes, ranges, like.shape, like.stride(), like.dtype, bits, group_size
    )


def assert_same_values(actual, expected):
    # The sign of zero is not specified.
    assert_same_bits(actual.cpu() + 0.0, expected.cpu() + 0.0)


def assert_as_specified(x, bits, group_size):
    for rounding in roundings_of(group_size):
        with case(rounding=rounding):
            assert_rounded_as_specified(x, bits, group_size, rounding)


def assert_rounded_as_specified(x, bits, group_size, rounding):
    random = encoding(rounding, -5, 9)
    expected = reference.relu_codes(x.cpu(), bits, group_size, **random)
    output, codes, ranges = ops.relu_codes(x, bits, group_size, **random)
    if x.numel():
        assert output.stride() == x.stride()
    assert_same_values(output, expected[0])
    assert_same_bits(codes.cpu(), expected[1])
    assert_same_bits(ranges.cpu(), expected[2])

    overwritten = x.clone()
    in_place = ops.relu_codes_(overwritten, bits, group_size, **random)
    assert_same_bits(overwritten, output)
    assert_same_bits(in_place[0], codes)
    assert_same_bits(in_place[1], ranges)

    drawn = ops.DrawnBits.of(rounding, -5, 9)
    arguments = x.shape, x.stride(), x.dtype, bits, group_size
    value = ops.dequantize_zeroed(codes, ranges, *arguments, drawn=drawn)
    wanted = reference.dequantize_zeroed(*expected[1:], *arguments, drawn)
    assert_same_values(value, wanted)

    grad = torch.empty_like(x).copy_(make(x.shape, x.dtype, x.device))
    format = bits, random['rotated']
    passed = ops.relu_codes_backward(grad, codes, *format)
    if x.numel():
        assert passed.stride() == x.stride()
    assert_same_bits(
        passed.cpu(),
        reference.relu_codes_backward(grad.cpu(), codes.cpu(), *format),
    )


@in_turn(by='shape', bits=BITS, shape=SHAPES, special=SPECIAL, dtype=DTYPES)
def test_as_specified(bits, dtype, shape, special, device):
    x = make(shape, dtype, device, special)
    for group_size in ops.GROUP_SIZES:
        with case(group_size=group_size):
            assert_as_specified(x, bits, group_size)


@in_turn(
    by='bits',
    special=SPECIAL,
    bits=[2, 3, 5],
    dtype=DTYPES,
    shape=[(3, 10, 7, 5), (2, 64, 8, 8)],
)
def test_channels_last_is_read_in_memory_order(
    bits, dtype, shape, special, device
):
    x = make(shape, dtype, device, special, channels_last=True)
    assert_as_specified(x, bits, 256)
    # The same numbers as a contiguous tensor give the same codes.
    twin = x.movedim(1, -1)
    assert twin.is_contiguous()
    found = ops.relu_codes(x, bits, 64, seed=1)
    expected = ops.relu_codes(twin, bits, 64, seed=1)
    assert_same_bits(found[1], expected[1])
    assert_same_bits(found[2], expected[2])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_pointers_off_the_vector_boundary(dtype, device):
    base = make((1040,), dtype, device, SPECIAL['all'])
    for row in pairs(bits=BITS, start=range(1, 5), numel=(1024, 1027)):
        x = base[row['start'] :][: row['numel']].unsqueeze(0)
        with case(**row):
            assert_as_specified(x, row['bits'], 128)


def test_codes_off_the_word_boundary(device):
    x = make((5, 24), torch.float32, device)
    for bits in BITS:
        _, codes, _ = ops.relu_codes(x, bits, 64, seed=1)
        for rows in (slice(1, 4), slice(3, 5)):
            found = ops.relu_codes_backward(x[rows], codes[rows], bits)
            with case(bits=bits, rows=rows):
                assert_same_values(found, x[rows].relu())


@in_turn(
    by='dtype', special=SPECIAL, dtype=DTYPES, channels_last=[False, True]
)
def test_forward_and_backward_are_those_of_torch(
    dtype, channels_last, special, device
):
    x = make((3, 16, 9, 11), dtype, device, special, channels_last)
    twin = x.clone().requires_grad_()
    expected = torch.relu(twin)
    grad = torch.randn_like(x)
    expected.backward(grad)
    for bits in BITS:
        output, codes, _ = ops.relu_codes(x, bits, seed=2)
        found = ops.relu_codes_backward(grad, codes, bits)
        with case(bits=bits):
            assert_same_values(output, expected.detach())
            assert_same_bits(found, twin.grad)


@in_turn(by='dtype', special=SPECIAL, dtype=DTYPES)
def test_decodes_what_is_exact(dtype, special, device):
    x = make((3, 16, 9, 11), dtype, device, special)
    for bits in BITS:
        output, codes, ranges = ops.relu_codes(x, bits, 64, seed=2)
        value = decode(codes, ranges, output, bits, 64)
        with case(bits=bits):
            assert not value[output == 0].any()
            assert torch.equal(value.isnan(), output.isnan())
            assert torch.equal(value.isinf(), output.isinf())


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_codes_are_those_of_a_fused_normalisation(dtype, device):
    zero, one = torch.zeros(4, device=device), torch.ones(4, device=device)
    affine = zero, one, None, None
    rows = pairs(bits=BITS, rounding=ops.ROUNDINGS, size=[(11, 13), (8, 16)])
    for row in rows:
        bits, rounding = row['bits'], row['rounding']
        x = make((3, 4, *row['size']), dtype, device)
        # The identity but for its random stream.
        fused = ops.norm_act(
            *(x, torch.zeros_like(x), *affine, True, 2, bits),
            **encoding(rounding, 3, 4),
        )
        random = encoding(rounding, 3, 4 | 1 << 63)
        output, codes, ranges = ops.relu_codes(x, bits, **random)
        with case(**row):
            assert_same_bits(output, fused[0])
            assert_same_bits(codes, fused[3])
            assert_same_bits(ranges, fused[4])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_the_smallest_numbers_pass(dtype, device):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([smallest, -smallest, 0.0, 1.0], device=device)
    x = x.repeat(2, 32).to(dtype)
    assert (x[:, 0] > 0).all()
    ones = torch.ones_like(x)
    for bits in BITS:
        _, codes, _ = ops.relu_codes(x, bits, 64, seed=1)
        passed = ops.relu_codes_backward(ones, codes, bits)
        with case(bits=bits):
            assert_as_specified(x, bits, 64)
            assert torch.equal(passed, (x > 0).to(dtype))


def test_groups_of_one_kind(device):
    x = torch.full((3, 300), -1.0, device=device)
    x[1] = 1.5
    x[2, 256:] = 1.5
    for bits in BITS:
        output, codes, ranges = ops.relu_codes(x, bits, seed=1)
        with case(bits=bits):
            assert_as_specified(x, bits, 256)
            value = decode(codes, ranges, output, bits, 256)
            assert torch.equal(value, output)
            assert not ranges[0].any() and not codes[0].any()


@pytest.mark.parametrize('bits', BITS)
def test_rounding_is_unbiased_with_the_variance_of_the_closed_form(
    bits, device
):
    draws = 4096
    x = make((1, 256), torch.float32, device)
    samples = x.expand(draws, 256).contiguous()
    output, codes, ranges = ops.relu_codes(samples, bits, seed=11)
    assert torch.equal(ranges, ranges[:1].expand_as(ranges))
    y = decode(codes, ranges, output, bits, 256).double()

    positive = x[0] > 0
    assert not y[:, ~positive].any()
    y, exact = y[:, positive], x[0, positive].double()
    low, step = ranges[0, 0].double().tolist()
    position = (exact - low) / step
    fraction = position - position.floor()
    variance = step**2 * fraction * (1 - fraction)
    deviation = (variance / draws).sqrt() + 1e-12
    z = (y.mean(0) - exact) / deviation
    # 16 random bits, but 15 for codes of 8: a fraction is off by at most half
    # of the last.
    resolution = step * 2 ** -(16.0 if bits == 8 else 17.0) / deviation
    assert (z.abs() <= 5 + resolution).all()
    assert z[fraction > 0.01].pow(2).mean() < 1.4

    # The sample variance of a two-point law has a known spread, too.
    kurtosis = variance * (step**2 - 3 * variance) - variance**2
    spread = ((kurtosis + 2 * variance**2).clamp(min=0) / draws).sqrt()
    error = (y.var(0) - variance).abs()
    assert (error <= 6 * spread + 1e-4 * step**2).all()


def test_seed_and_offset_decide(device):
    x = make((2, 300), torch.float32, device)

    def codes(**random):
        return ops.relu_codes(x, 2, **random)[1]

    first = codes(seed=1, offset=2)
    assert torch.equal(first, codes(seed=1, offset=2))
    for other in ((2, 2), (1, 3), (1, 2 + (1 << 40)), (1, 2 + (1 << 63))):
        seed, offset = other
        assert not torch.equal(first, codes(seed=seed, offset=offset))


def test_range_of_samples(device):
    x = make((5, 3, 100), torch.float16, device)
    output, codes, ranges = ops.relu_codes(x, 3, 64, seed=4)
    whole = decode(codes, ranges, output, 3, 64)
    part = decode(codes[1:4], ranges[1:4], output[1:4], 3, 64)
    assert torch.equal(part, whole[1:4])


def test_layouts_that_are_not_dense_rows_are_copied(device):
    base = make((6, 8, 40), torch.float32, device)
    for view in (base[:, :, ::2], base[:, 1:5], base.transpose(0, 1)):
        found = ops.relu_codes(view, 4, 64, seed=2)
        expected = ops.relu_codes(view.contiguous(), 4, 64, seed=2)
        for one, other in zip(found, expected):
            assert torch.equal(one, other)


def test_more_rows_than_a_grid_has(device):
    x = torch.arange(70000 * 9, device=device, dtype=torch.float32)
    x = (x % 251 - 125).view(70000, 9)
    assert_as_specified(x, 4, 64)


def test_sizes(device):
    output, codes, ranges = ops.relu_codes(
        torch.zeros(3, 1001, device=device), 2, 256, seed=0
    )
    assert output.shape == (3, 1001)
    assert codes.shape == (3, 252) and codes.dtype == torch.uint8
    assert ranges.shape == (3, 4, 2) and ranges.dtype == torch.bfloat16


def test_wrong_arguments(device):
    x = make((3, 40), torch.float32, device)
    for op in (ops.relu_codes, ops.relu_codes_):
        for bits in (0, 1, 9, 2.5):
            with pytest.raises(ValueError, match=f'from 2 to 8.*got {bits}'):
                op(x, bits, seed=1)
        with pytest.raises(ValueError, match='512, got 100'):
            op(x, 2, 100, seed=1)
        with pytest.raises(TypeError, match='float64'):
            op(x.double(), 2, seed=1)
        with pytest.raises(ValueError, match='at least one dimension'):
            op(x[0, 0], 2, seed=1)
    codes = ops.relu_codes(x, 2, seed=1)[1]
    with pytest.raises(ValueError, match='from 2 to 8.*got 1'):
        ops.relu_codes_backward(x, codes, 1)
    with pytest.raises(ValueError, match='at least one dimension'):
        ops.relu_codes_backward(x[0, 0], codes, 2)
    with pytest.raises(TypeError, match='float64'):
        ops.relu_codes_backward(x.double(), codes, 2)
    for grad, wrong in (
        (x, codes[:2]),
        (x, codes[:, :8].contiguous()),
        (x[:, :32].contiguous(), codes),
    ):
        with pytest.raises(RuntimeError, match='codes must be of shape'):
            ops.relu_codes_backward(grad, wrong, 2)
    with pytest.raises(RuntimeError, match='codes must be uint8'):
        ops.relu_codes_backward(x, codes.int(), 2)


def test_layouts_that_are_refused(device):
    x = make((4, 8, 6), torch.float32, device)
    codes = ops.relu_codes(x, 2, seed=1)[1]
    for view, message in (
        (x[:, ::2], 'dense in memory'),
        (x.transpose(0, 1), 'dimension 0 must be the outermost.* got stride'),
    ):
        with pytest.raises(RuntimeError, match=f'input.*{message}'):
            ops.relu_codes_(view, 2, seed=1)
        with pytest.raises(RuntimeError, match=f'grad_output.*{message}'):
            ops.relu_codes_backward(view, codes, 2)


def test_kernels_check_for_themselves(device):
    x = make((3, 40), torch.float32, device)
    kernels = torch.ops.mmactnn
    codes = ops.relu_codes(x, 2, seed=1)[1]
    for op in (kernels.relu_codes.default, kernels.relu_codes_.default):
        with pytest.raises(RuntimeError, match='from 2 to 8.*got 1'):
            op(x, 1, 64, 1, 2)
        with pytest.raises(RuntimeError, match='512, got 100'):
            op(x, 2, 100, 1, 2)
        with pytest.raises(RuntimeError, match='must be float32, float16'):
            op(x.double(), 2, 64, 1, 2)
    with pytest.raises(RuntimeError, match='from 2 to 8.*got 9'):
        kernels.relu_codes_backward.default(x, codes, 9)


@pytest.mark.parametrize('rotated', [False, True])
@pytest.mark.parametrize('bits', [2, 5])
def test_opcheck(bits, rotated, device):
    x = make((3, 8, 32), torch.float32, device)
    kernels = torch.ops.mmactnn
    arguments = (bits, 256, 1, 2, None, rotated)
    opcheck(kernels.relu_codes.default, (x, *arguments))
    opcheck(kernels.relu_codes_.default, (x.clone(), *arguments))
    codes = kernels.relu_codes.default(x, *arguments)[1]
    opcheck(kernels.relu_codes_backward.default, (x, codes, bits, rotated))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
class TestCuda:
    """Behaviour that only exists on a GPU."""

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
        codes, ranges = ops.relu_codes_(x, 8, seed=1)
        assert torch.equal(x[-1, -1024:], tail.relu())
        grad = ops.relu_codes_backward(x.fill_(1), codes, 8)
        assert torch.equal(grad[-1, -1024:], (tail > 0).half())
        assert not grad[0, :1024].any()

    def test_no_synchronisation(self):
        x = torch.randn(8, 4096, device='cuda')
        codes = ops.relu_codes(x, 2, seed=1)[1]
        torch.cuda.set_sync_debug_mode('error')
        try:
            ops.relu_codes(x, 2, seed=1)
            ops.relu_codes_backward(x, codes, 2)
        finally:
            torch.cuda.set_sync_debug_mode('default')

    def test_codes_on_another_device(self):
        x = torch.randn(8, 40, device='cuda')
        codes = ops.relu_codes(x, 2, seed=1)[1]
        with pytest.raises(RuntimeError, match='codes must be on the device'):
            ops.relu_codes_backward(x, codes.cpu(), 2)
