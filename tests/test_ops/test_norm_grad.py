"""Gradients of a fused normalisation against their specification."""

import itertools

import pytest
import torch
from support.opcheck import opcheck
from support.pairs import case, in_turn, pairs, parametrize_pairs
from support.roundings import encoding

from mmactnn import ops
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = tuple(range(1, 9))
SHAPES = (
    (5, 3),
    (6, 40),
    (3, 7, 5),
    (2, 16, 8, 8),  # everything is aligned
    (3, 8, 7, 7),  # planes off the blocks of 8
    (2, 5, 7, 9),  # rows off them, too
    (2, 8, 2, 2),  # several planes a block
    (1, 1, 4, 4),
    (2, 8, 3, 4, 5),
    (2, 264, 2, 4),  # more columns than a warp has lanes
)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
PLAIN, SPLIT, MASK = 'plain', 'split', 'mask'
KINDS = (PLAIN, SPLIT, MASK)


class Case:
    """Codes of a normalisation, and a gradient of its output."""

    def __init__(
        self,
        shape,
        dtype,
        kind,
        bits,
        act_bits=2,
        group_size=64,
        channels_last=False,
        special=None,
        device='cpu',
        rounding='dither',
    ):
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(shape, generator=generator)
        grad = torch.randn(shape, generator=generator)
        scale = torch.randn(shape[1], generator=generator)
        means = torch.randn(2, shape[1], generator=generator) / 10
        if special is not None:
            flat = x.view(-1)
            flat[0], flat[x.numel() // 2], flat[-1] = special
        x, grad = x.to(dtype), grad.to(dtype)
        if channels_last:
            memory_format = CHANNELS_LAST[len(shape)]
            x = x.to(memory_format=memory_format)
            grad = grad.to(memory_format=memory_format)
        zero, one = torch.zeros(shape[1]), torch.ones(shape[1])
        output = reference.norm_act(
            x,
            x.flip(0) if kind == MASK else None,
            zero,
            one,
            None,
            None,
            kind != PLAIN,
            bits,
            act_bits,
            group_size,
            **encoding(rounding, 3, 0),
        )
        self.kind, self.bits, self.act_bits = kind, bits, act_bits
        self.group_size, self.rounding = group_size, rounding
        _, self.codes, self.ranges, self.act_codes, _ = (
            tensor.to(device) for tensor in output
        )
        self.grad = grad.to(device)
        self.scale, self.means = scale.to(device), means.to(device)

    def _format(self):
        return self.bits, self.group_size, self.kind == SPLIT

    def sums(self, where=ops, drawn=None):
        """The gradient that passes, if it is returned, and the sums."""
        if self.kind == MASK:
            return where.norm_add_grad_sums(
                self.grad,
                self.codes,
                self.ranges,
                self.act_codes,
                self.bits,
                self.act_bits,
                self.group_size,
                drawn=drawn,
            )
        return None, where.norm_grad_sums(
            self.grad,
            self.codes,
            self.ranges,
            *self._format(),
            drawn=drawn,
        )

    def grad_input(self, where=ops, drawn=None):
        """The gradient of the input."""
        return where.norm_grad_input(
            self.grad,
            self.codes,
            self.ranges,
            self.scale,
            self.means,
            *self._format(),
            drawn=drawn,
        )

    def check(self):
        """Compare with the specification."""
        elements = self.grad.numel() // max(self.grad.shape[1], 1)
        # The codes are those of the seed 3 at offset 0. Without rotation they
        # may be decoded alone, too.
        roundings = ('dither', 'stochastic')
        if self.rounding == 'rotated':
            roundings = ('rotated',)
        for drawn in (ops.DrawnBits.of(each, 3, 0) for each in roundings):
            passed, sums = self.sums(ops, drawn)
            expected_passed, expected = self.sums(reference, drawn)
            torch.testing.assert_close(
                sums, expected, rtol=1e-5, atol=1e-6 * elements, equal_nan=True
            )
            if self.kind == MASK:
                assert_equal(passed, expected_passed)
            else:
                assert_equal(
                    self.grad_input(ops, drawn),
                    self.grad_input(reference, drawn),
                )


def assert_equal(actual, expected):
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True
    )


def min_bits(kind):
    return 2 if kind == SPLIT else 1


def layouts(shape):
    return (False, True) if len(shape) in CHANNELS_LAST else (False,)


@in_turn(by='kind', shape=SHAPES, kind=KINDS, dtype=DTYPES)
def test_equals_reference(shape, dtype, kind, device):
    for channels_last, bits in itertools.product(layouts(shape), (2, 3, 4, 8)):
        act_bits = bits if bits < 8 else 5
        with case(channels_last=channels_last, bits=bits):
            Case(
                shape,
                dtype,
                kind,
                bits,
                act_bits,
                channels_last=channels_last,
                device=device,
            ).check()


@pytest.mark.parametrize('kind', KINDS)
def test_every_width(kind, device):
    for row in pairs(
        bits=BITS,
        shape=((2, 16, 4, 8), (2, 5, 3, 3)),
        channels_last=(False, True),
    ):
        with case(**row):
            bits = row.pop('bits')
            Case(
                **row,
                dtype=torch.float32,
                kind=kind,
                bits=max(bits, min_bits(kind)),
                act_bits=max(9 - bits, 2),
                device=device,
            ).check()


@pytest.mark.parametrize('kind', KINDS)
def test_every_group_size(kind, device):
    for row in pairs(
        group_size=ops.GROUP_SIZES,
        shape=((3, 8, 14, 14), (2, 24, 8, 8), (2, 5, 15, 15)),
        channels_last=(False, True),
    ):
        with case(**row):
            Case(
                **row, dtype=torch.float16, kind=kind, bits=2, device=device
            ).check()


@in_turn(
    by='kind',
    kind=KINDS,
    shape=[
        (2, 16, 8, 8),
        (3, 256),
        (2, 64, 3, 4),  # groups end inside of channels
        (2, 8, 2, 4, 8),
        (2, 264, 2, 8),
        (2, 5, 7, 9),  # no whole groups
    ],
    bits=[1, 2, 3, 4, 5],
    act_bits=[2, 3, 4, 5, 8],
    dtype=DTYPES,
    channels_last=[False, True],
    special=[None, (torch.inf, 1.0, torch.nan)],
)
def test_rotated(
    kind, shape, bits, act_bits, dtype, channels_last, special, device
):
    Case(
        shape,
        dtype,
        kind,
        max(bits, min_bits(kind)),
        act_bits,
        256,
        channels_last and len(shape) in CHANNELS_LAST,
        special,
        device,
        'rotated',
    ).check()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_nan_and_inf(dtype, kind, device):
    inf, nan = torch.inf, torch.nan
    for special, bits, channels_last in itertools.product(
        ((inf, -inf, nan), (-inf, 1.0, -inf), (nan, 1.0, 2.0)),
        (2, 3, 4, 5),
        (False, True),
    ):
        with case(special, bits=bits, channels_last=channels_last):
            Case(
                (2, 8, 7, 7),
                dtype,
                kind,
                bits,
                channels_last=channels_last,
                special=special,
                device=device,
            ).check()


@pytest.mark.parametrize('kind', KINDS)
def test_nan_in_the_gradient_stays_where_the_mask_lets_it(kind, device):
    case = Case((2, 8, 5, 8), torch.float32, kind, 2, device=device)
    case.grad[0, 3, 2, 1:5] = torch.tensor(
        [torch.nan, torch.inf, torch.nan, torch.inf], device=device
    )
    case.check()
    _, sums = case.sums()
    assert sums[:, torch.arange(8) != 3].isfinite().all()


def test_gradient_equals_that_of_batch_norm(device):
    # At 8 bits: the codes err by half a step of 1/255 of a group's range.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, 10, 10, generator=generator).to(device)
    grad = torch.randn(x.shape, generator=generator).to(device)
    weight = torch.rand(4, generator=generator).to(device) + 0.5
    bias = torch.randn(4, generator=generator).to(device)
    x.requires_grad_()
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    output = torch.nn.functional.batch_norm(
        x, None, None, weight, bias, training=True
    ).relu()
    expected = torch.autograd.grad(output, leaves, grad)
    with torch.no_grad():
        mean, _, invstd = ops.channel_stats(x, 1e-5, 0.1, None, None)
        codes, ranges = reference.norm_act(
            x, None, mean, invstd, weight, bias, True, 8, 8, 64, 1, 0
        )[1:3]
        sums = ops.norm_grad_sums(grad, codes, ranges, 8, 64, True)
        result = ops.norm_grad_input(
            grad, codes, ranges, weight * invstd, sums / 800, 8, 64, True
        )
    torch.testing.assert_close(sums[0], expected[2], rtol=1e-5, atol=1e-4)
    # Four standard deviations of that.
    torch.testing.assert_close(sums[1], expected[1], rtol=0, atol=1.0)
    torch.testing.assert_close(result, expected[0], rtol=0.02, atol=0.01)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('shape', [(0, 3, 4), (4, 3, 0), (4, 0, 3)], ids=str)
def test_empty(shape, kind, device):
    grad = torch.empty(shape, device=device)
    rows, channels = shape[:2]
    codes = torch.empty(rows, 0, dtype=torch.uint8, device=device)
    width = 4 if kind == SPLIT else 2
    ranges = torch.empty(rows, 0, width, dtype=torch.bfloat16, device=device)
    if rows == 0:
        codes = codes.new_empty((0, 4))
        ranges = ranges.new_empty((0, 1, width))
        # The shapes that norm_act() gives where there are no samples.
        codes, ranges = codes[:, :0], ranges[:, :0]
    relu = kind == SPLIT
    zeros = torch.zeros(2, channels, device=device)
    if kind == MASK:
        passed, sums = ops.norm_add_grad_sums(
            grad, codes, ranges, codes, 2, 2, 64
        )
        assert passed.shape == shape
    else:
        sums = ops.norm_grad_sums(grad, codes, ranges, 2, 64, relu)
        result = ops.norm_grad_input(
            grad, codes, ranges, zeros[0], zeros, 2, 64, relu
        )
        assert result.shape == shape
    assert torch.equal(sums, zeros)


@pytest.mark.parametrize('kind', KINDS)
def test_unaligned_start(kind, device):
    case = Case((4, 8, 4, 4), torch.float16, kind, 2, device=device)
    base = torch.empty(case.grad.numel() + 1, dtype=torch.half, device=device)
    case.grad = base[1:].view_as(case.grad).copy_(case.grad)
    case.check()


@pytest.mark.parametrize('kind', KINDS)
def test_two_calls_are_equal(kind, device):
    case = Case((16, 16, 14, 14), torch.float16, kind, 2, device=device)
    assert torch.equal(case.sums()[1], case.sums()[1])


def test_errors(device):
    case = Case((2, 8, 6, 6), torch.float32, SPLIT, 2, device=device)
    grad, codes, ranges = case.grad, case.codes, case.ranges
    vectors = case.scale, case.means
    with pytest.raises(RuntimeError, match=r'got strides \[288, 36, 1, 6\]'):
        ops.norm_grad_sums(grad.transpose(2, 3), codes, ranges, 2, 64, True)
    with pytest.raises(ValueError, match='2 to 5 dimensions, got shape'):
        ops.norm_grad_sums(grad[0, 0, 0], codes, ranges, 2, 64, True)
    with pytest.raises(TypeError, match='float64'):
        ops.norm_grad_sums(grad.double(), codes, ranges, 2, 64, True)
    with pytest.raises(ValueError, match='bits must be an integer from 2'):
        ops.norm_grad_sums(grad, codes, ranges, 1, 64, True)
    with pytest.raises(ValueError, match='act_bits must be an integer from 2'):
        ops.norm_add_grad_sums(grad, codes, ranges, codes, 2, 1, 64)
    with pytest.raises(ValueError, match='512, got 32'):
        ops.norm_grad_input(grad, codes, ranges, *vectors, 2, 32, True)
    with pytest.raises(RuntimeError, match=r'shape \[2, 5, 2\]'):
        ops.norm_grad_sums(grad, codes, ranges, 2, 64, False)
    with pytest.raises(RuntimeError, match=r'codes must .* shape \[2, 108\]'):
        ops.norm_grad_input(grad, codes, ranges, *vectors, 3, 64, True)
    with pytest.raises(RuntimeError, match='act_codes must be a contiguous'):
        plain = ranges[..., :2].contiguous()
        ops.norm_add_grad_sums(grad, codes, plain, codes[:1], 2, 2, 64)
    with pytest.raises(ValueError, match=r'scale must be of shape \(8,\)'):
        ops.norm_grad_input(
            grad, codes, ranges, vectors[0][:4], vectors[1], 2, 64, True
        )
    with pytest.raises(RuntimeError, match='means must be a contiguous float'):
        ops.norm_grad_input(
            grad, codes, ranges, vectors[0], vectors[1].half(), 2, 64, True
        )


@pytest.mark.parametrize('rounding', ['dither', 'rotated'])
@pytest.mark.parametrize('kind', KINDS)
def test_opcheck(kind, rounding, device):
    namespace = torch.ops.mmactnn
    drawn = [3, 0, 0, int(rounding == 'rotated')]
    for channels_last in (False, True):
        case = Case(
            (2, 8, 4, 8),
            torch.float32,
            kind,
            2,
            group_size=256,
            channels_last=channels_last,
            device=device,
            rounding=rounding,
        )
        payload = case.grad, case.codes, case.ranges
        if kind == MASK:
            opcheck(
                namespace.norm_add_grad_sums.default,
                (*payload, case.act_codes, 2, 2, 256, drawn),
            )
            continue
        format = 2, 256, kind == SPLIT, drawn
        opcheck(namespace.norm_grad_sums.default, (*payload, *format))
        opcheck(
            namespace.norm_grad_input.default,
            (*payload, case.scale, case.means, *format),
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
class TestCuda:
    """Behaviour that only exists on a GPU."""

    @parametrize_pairs(
        shape=[
            (64, 64, 28, 28),
            (16, 512, 7, 7),
            (4, 40, 101, 99),
            (9, 3, 80, 9),
        ],
        kind=KINDS,
        channels_last=[False, True],
    )
    def test_many_splits(self, shape, channels_last, kind):
        for dtype in (torch.float32, torch.float16):
            Case(
                shape,
                dtype,
                kind,
                2,
                group_size=256,
                channels_last=channels_last,
                device='cuda',
            ).check()

    @pytest.mark.parametrize('kind', KINDS)
    def test_no_synchronisation(self, kind):
        case = Case((8, 16, 8, 8), torch.float32, kind, 2, device='cuda')
        case.sums()
        torch.cuda.set_sync_debug_mode('error')
        try:
            case.sums()
            if kind != MASK:
                case.grad_input()
        finally:
            torch.cuda.set_sync_debug_mode('default')
