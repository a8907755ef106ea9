"""Rotated codes: what they are, where they are, and their law."""

import math

import pytest
import torch
from support.layers import assert_same_bits
from support.pairs import case, pairs
from support.roundings import encoding

from mmactnn import ops
from mmactnn.ops import rotation_reference
from mmactnn.ops.rotation import (
    MAX_ROTATED_BITS,
    ROTATION,
    SQUARED_ERRORS,
    rotates,
    rotates_zeroed,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Bits for values that are rotated, by the kind of the codes.
BITS = dict(plain=(1, 2, 3), split=(1, 2, 3), zeroed=(1,))
KINDS = tuple(BITS)
DRAW = 5, 9


def round_trip(x, kind, bits, rounding='rotated', group_size=ROTATION, seed=5):
    """Decoded values of codes with some bits for values.

    Args:
        x (Tensor[N, C, *]): What is coded; rectified but for plain codes.
        kind (str): Of the codes.
        bits (int): Bits for values.
        rounding (str, optional): Rounding.
        group_size (int, optional): Elements a range.
        seed (int, optional): Key of the random bits.

    Returns:
        Tensor[N, C, *]: In the layout of ``x``.
    """
    draw = seed, DRAW[1]
    random = encoding(rounding, *draw)
    drawn = dict(drawn=ops.DrawnBits.of(rounding, *draw))
    layout = x.shape, x.stride(), x.dtype
    if kind == 'plain':
        codes = ops.quantize(x, bits, group_size, **random)
        return ops.dequantize(*codes, *layout, bits, group_size, **drawn)
    # A bit more, for the rectifier.
    width = bits + 1
    if kind == 'zeroed':
        _, *codes = ops.relu_codes(x, width, group_size, **random)
        return ops.dequantize_zeroed(
            *codes, *layout, width, group_size, **drawn
        )
    mean, invstd = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    vectors = mean.float(), invstd.float(), None, None
    _, *codes = ops.norm_act(
        x, None, *vectors, True, width, 0, group_size, **random
    )
    return ops.dequantize_split(
        *codes[:2], None, None, *layout, width, group_size, **drawn
    )


def target(x, kind):
    return x if kind == 'plain' else x.relu()


def groups(count, device, dtype=torch.float32):
    """Tensor[count, 4, 8, 8]: normally distributed, a group a sample."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn((count, 4, 8, 8), generator=generator)
    return x.to(device, dtype)


class TestWhere:
    """Which codes are rotated; all others have dither."""

    def test_rule(self):
        found = {
            (numel, bits)
            for numel in (0, 64, 255, 256, 300, 512)
            for bits in range(1, 9)
            if rotates(numel, bits)
        }
        expected = {(n, bits) for n in (0, 256, 512) for bits in (1, 2, 3)}
        assert found == expected
        assert MAX_ROTATED_BITS == 3
        found = {bits for bits in range(2, 9) if rotates_zeroed(256, bits)}
        assert found == {2} and not rotates_zeroed(300, 2)

    @pytest.mark.parametrize('kind', KINDS)
    def test_others_are_those_of_dither(self, kind, device):
        """Ragged samples, and more bits: bit for bit."""
        for row in pairs(
            shape=[(3, 4, 8, 8), (3, 4, 9, 7), (2, 3, 5, 5)],
            bits=range(1, 8),
            dtype=DTYPES,
        ):
            shape, bits, dtype = row.values()
            x = torch.randn(shape, device=device).to(dtype)
            found = round_trip(x, kind, bits)
            expected = round_trip(x, kind, bits, 'dither')
            with case(**row):
                numel = x[0].numel()
                is_rotated = rotates(numel, bits)
                if kind == 'zeroed':
                    is_rotated = rotates_zeroed(numel, bits + 1)
                if is_rotated:
                    assert not torch.equal(found, expected)
                else:
                    assert_same_bits(found, expected)

    def test_one_of_two_payloads(self, device):
        """Codes of a normalised value and of a sum, of other widths."""
        x, residual = groups(3, device), groups(3, device).flip(0)
        ones, zeros = x.new_ones(4), x.new_zeros(4)
        grad = torch.ones_like(x)
        for bits, act_bits in ((2, 8), (8, 2)):
            format = x, residual, zeros, ones, None, None, True, bits, act_bits
            found, twin = (
                ops.norm_act(*format, **encoding(rounding, *DRAW))
                for rounding in ('rotated', 'dither')
            )
            # Output; codes and ranges; those of the output.
            assert_same_bits(found[0], twin[0])
            for pair, rotated in ((1, bits < 4), (3, act_bits < 5)):
                same = all(
                    torch.equal(a, b)
                    for a, b in zip(found[pair : pair + 2], twin[pair:])
                )
                assert same == (not rotated)
            drawn = ops.DrawnBits.of('rotated', *DRAW)
            passed, _ = ops.norm_add_grad_sums(
                grad, *found[1:4], bits, act_bits, 256, drawn=drawn
            )
            assert torch.equal(passed, (found[0] > 0).float())

    def test_size_of_groups(self, device):
        x = groups(2, device)
        vectors = x.new_zeros(4), x.new_ones(4), None, None
        widths = torch.tensor([[2, 2], [0, 2]], device=device)
        widths = widths[0].to(torch.uint8), widths[1].int(), 4
        random = encoding('rotated', *DRAW)
        message = 'group_size must be 256 for rotated codes, got'
        for call in (
            lambda: ops.quantize(x, 2, 64, **random),
            lambda: ops.quantize_rows(x, *widths, 64, **random),
            lambda: ops.relu_codes(x, 2, 64, **random),
            lambda: ops.relu_codes_(x.clone(), 2, 64, **random),
            lambda: ops.norm_act(x, None, *vectors, True, 2, 0, 64, **random),
            lambda: round_trip(x, 'plain', 8, group_size=512),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        codes = ops.quantize(x, 2, 64, seed=5)
        drawn = ops.DrawnBits.of('rotated', *DRAW)
        layout = x.shape, x.stride(), x.dtype
        with pytest.raises(RuntimeError, match=message):
            ops.dequantize(*codes, *layout, 2, 64, drawn=drawn)
        _, *codes = ops.relu_codes(x, 2, 64, seed=5)
        with pytest.raises(RuntimeError, match=message):
            ops.dequantize_zeroed(*codes, *layout, 2, 64, drawn=drawn)

    def test_split_ranges_have_three_numbers(self, device):
        x = groups(2, device)
        vectors = x.new_zeros(4), x.new_ones(4), None, None
        for bits, width in ((2, 3), (4, 3), (5, 4)):
            ranges = ops.norm_act(
                *(x, None, *vectors, True, bits, 0),
                **encoding('rotated', 1, 2),
            )[2]
            assert ranges.shape == (2, 1, width), bits


class TestGroups:
    """Groups with one property, among others of normal values."""

    @pytest.mark.parametrize('kind', KINDS)
    def test_constant(self, kind, device):
        """Exact, as the mean of bfloat16 numbers is."""
        for value in (0.0, 1.0, -2.5, 2.0**-100, -(2.0**100)):
            x = torch.full((2, 4, 8, 8), value, device=device)
            for bits in BITS[kind]:
                with case(value=value, bits=bits):
                    found = round_trip(x, kind, bits)
                    assert torch.equal(found, target(x, kind))

    @pytest.mark.parametrize('kind', KINDS)
    def test_of_one_sign(self, kind, device):
        x = groups(4, device).abs()
        x[2:] *= -1
        for bits in BITS[kind]:
            found = round_trip(x, kind, bits)
            with case(bits=bits):
                if kind != 'plain':
                    assert not found[2:].any()
                error = found[:2] - x[:2]
                scale = (x[:2] - x[:2].mean((1, 2, 3), True)).norm()
                assert error.norm() / scale < 0.85 / 2 ** (bits - 1)

    @pytest.mark.parametrize('kind', KINDS)
    def test_of_two_constants(self, kind, device):
        """Each kind of split and zeroed codes has its mean: exact."""
        x = groups(2, device).sign() * 1.5
        for bits in BITS[kind]:
            found = round_trip(x, kind, bits)
            assert torch.equal(found, target(x, kind)) == (kind != 'plain')

    @pytest.mark.parametrize('kind', KINDS)
    def test_with_an_outlier(self, kind, device):
        """The error is that of the group, and spread over it."""
        x = groups(64, device) * 1e-3
        x[:, 1, 2, 3] = 1.0
        for bits in BITS[kind]:
            error = round_trip(x, kind, bits) - target(x, kind)
            with case(bits=bits):
                norms = error.flatten(1).norm(dim=1)
                # Of the variance of one bit, and more in a few draws.
                assert (norms < 1.2).all() and norms.mean() < 0.9

    @pytest.mark.parametrize('kind', KINDS)
    @pytest.mark.parametrize('dtype', DTYPES, ids=str)
    def test_nan_and_inf_spoil_their_group(self, dtype, kind, device):
        x = groups(4, device, dtype)
        for special in (math.nan, math.inf):
            spoilt = x.clone()
            spoilt[2, 3, 4, 5] = special
            for bits in BITS[kind]:
                found = round_trip(spoilt, kind, bits)
                expected = round_trip(x, kind, bits)
                passes = target(spoilt[2], kind) != 0
                with case(special=special, bits=bits):
                    assert found[2][passes].isnan().all()
                    for n in (0, 1, 3):
                        assert_same_bits(found[n], expected[n])

    @pytest.mark.parametrize('kind', KINDS)
    def test_largest_numbers_of_float16(self, kind, device):
        largest = torch.finfo(torch.float16).max
        x = groups(4, device).sign() * largest
        x[0], x[1, :, :, 0], x[2, 0] = largest, 0.0, -largest
        x = x.half()
        for bits in BITS[kind]:
            found = round_trip(x, kind, bits)
            assert found.isfinite().all(), bits

    @pytest.mark.parametrize('kind', KINDS)
    def test_smallest_numbers(self, kind, device):
        for power in (-60, -70, -126):
            x = groups(4, device) * 2.0**power
            for bits in BITS[kind]:
                found = round_trip(x, kind, bits)
                with case(power=power, bits=bits):
                    assert found.isfinite().all()
                    assert (found.abs() <= 10 * x.abs().amax()).all()


class TestLaw:
    """Mean and variance over draws."""

    DRAWS = 4096

    def study(self, values, kind, bits):
        """Error of many draws of one group.

        Args:
            values (Tensor[256]): The group.
            kind (str): Of the codes.
            bits (int): Bits for values.

        Returns:
            tuple[float, float]: Squared bias over the sum of squares that is
            coded; the estimate has no bias itself. Variance of elements that
            are not 0, over the mean of these squares.
        """
        x = values.expand(self.DRAWS, 256).reshape(-1, 4, 8, 8).contiguous()
        means = [0.0, 0.0]
        squares, runs = 0.0, 2
        for run in range(runs):
            found = round_trip(x, kind, bits, seed=run)
            error = (found - target(x, kind)).double().flatten(1)
            means[run % 2] += error.mean(0) / (runs / 2)
            squares += error.square().mean(0) / runs
        rest = values.double()
        positive = values > 0
        if kind == 'plain':
            rest = rest - rest.mean()
            coded = torch.ones_like(positive)
        else:
            passing = rest - rest[positive].mean()
            blocked = torch.zeros_like(rest)
            if kind == 'split' and not positive.all():
                blocked = rest - rest[~positive].mean()
            rest, coded = passing.where(positive, blocked), positive
        energy = rest.square().sum()
        variance = squares[coded].mean() / (energy / 256)
        return float(means[0] @ means[1] / energy), float(variance)

    @pytest.mark.parametrize(
        'kind, bits', [(kind, bits) for kind in KINDS for bits in BITS[kind]]
    )
    def test_of_normal_values(self, kind, bits, device):
        error = SQUARED_ERRORS[bits]
        values = torch.randn(
            256, generator=torch.Generator().manual_seed(3)
        ).to(device)
        bias, variance = self.study(values, kind, bits)
        # 1.5 % of the norm: 1.2 % at most were seen.
        assert abs(bias) < 0.015**2
        assert variance == pytest.approx(error / (1 - error), rel=0.05)

    # Values by name, with the limit of the bias over the norm: what
    # docs/rounding.md promises.
    LIMITS = {
        'one': 0.1,
        'two equal ones': 0.1,
        'four': 0.1,
        'half': 0.015,
        'heavy tails': 0.06,
    }

    def make_values(self, name):
        generator = torch.Generator().manual_seed(5)
        if name == 'heavy tails':
            # Student's t with two degrees of freedom has no variance.
            normal = torch.randn(3, 256, generator=generator)
            return normal[0] / (normal[1:].square().mean(0)).sqrt()
        values = torch.zeros(256)
        places = torch.randperm(256, generator=generator)
        numbers = torch.randn(256, generator=generator).abs()
        count = {'one': 1, 'two equal ones': 2, 'four': 4, 'half': 128}[name]
        if count <= 2:
            numbers.fill_(1.0)
        values[places[:count]] = numbers[:count]
        return values

    @pytest.mark.parametrize('name', LIMITS)
    @pytest.mark.parametrize('bits', BITS['plain'])
    def test_bias_of_other_values(self, bits, name, device):
        values = self.make_values(name).to(device)
        bias, variance = self.study(values, 'plain', bits)
        assert bias < self.LIMITS[name] ** 2
        # Not more than that of one bit at normal values, for all of them.
        assert variance < 0.9

    def test_projection(self, device):
        """The decoded rest has the coded one as its projection on it."""
        x = groups(64, device)
        rest = (x - x.mean((1, 2, 3), keepdim=True)).flatten(1).double()
        for bits in BITS['plain']:
            error = (round_trip(x, 'plain', bits) - x).flatten(1).double()
            share = (error * rest).sum(1) / rest.square().sum(1)
            # But for the bfloat16 numbers of the scale and the mean, and the
            # rounding of the rest to 8 bits.
            assert share.abs().max() < 2.0**-7, bits

    def test_signs(self):
        count = 4096
        signs = rotation_reference.negative_signs(torch.arange(count), 3, 1)
        other = rotation_reference.negative_signs(torch.arange(count), 3, 2)
        numbers = 1.0 - 2.0 * signs.double()
        assert signs.shape == (count, 256)
        # Sums of 4096 signs, and of their products: N(0, 4096).
        z = numbers.sum(0) / count**0.5
        assert z.abs().max() < 4.5
        assert float(z.square().mean()) == pytest.approx(1, abs=0.3)
        products = numbers.T @ numbers / count**0.5
        products.fill_diagonal_(0)
        assert products.abs().max() < 5.5
        neighbours = (numbers[1:] * numbers[:-1]).sum(0) / count**0.5
        assert neighbours.abs().max() < 4.5
        draws = (numbers * (1.0 - 2.0 * other.double())).sum(0) / count**0.5
        assert draws.abs().max() < 4.5
