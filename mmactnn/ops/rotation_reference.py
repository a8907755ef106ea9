"""Rotated codes in plain torch, as in ``csrc/common/rotation.h``."""

import torch

from .philox_reference import pair_words
from .rotation import ROTATION, STEPS

_WORDS = ROTATION // 32
# Elements by which the signs between matrices are shifted.
_SIGN_SHIFT = 21 * 8


def _multiply(numbers, steps):
    """Product with the Hadamard matrix over some bits of a place."""
    for step in steps:
        pairs = numbers.view(-1, ROTATION // (2 * step), 2, step)
        a, b = pairs.unbind(2)
        numbers = torch.stack([a + b, a - b], 2).view(-1, ROTATION)
    return numbers


def transform(numbers, negative, round=lambda numbers: numbers):
    """Three Hadamard matrices of order 16, with signs between them.

    Args:
        numbers (Tensor[G, 256]): int64.
        negative (Tensor[G, 256]): bool, from :func:`negative_signs`.
        round (Callable, optional): Called with the numbers before the last
            matrix. Defaults to none.

    Returns:
        Tensor[G, 256]: int64.
    """
    signs = 1 - 2 * negative.roll(-_SIGN_SHIFT, 1).long()
    numbers = _multiply(numbers, (2, 4, 8, 16)) * signs
    numbers = round(_multiply(numbers, (1, 32, 64, 128))) * signs
    return _multiply(numbers, (2, 4, 8, 16))


def negative_signs(groups, seed, offset):
    """Signs of rotations.

    Args:
        groups (Tensor[G]): int64, indices of groups.
        seed (int): 64 bits.
        offset (int): 64 bits.

    Returns:
        Tensor[G, 256]: bool, whether an element's sign is a minus.
    """
    pairs = torch.arange(_WORDS // 2, device=groups.device)
    pairs = (groups[:, None] * (_WORDS // 2) + pairs).flatten()
    words = pair_words(pairs, seed, offset).view(-1, 1, _WORDS, 1)
    # Block w + 8 i of 8 elements has byte i of word w.
    shifts = torch.arange(32, device=groups.device).view(4, 1, 8)
    return (words >> shifts & 1).bool().view(-1, ROTATION)


def offsets(groups, seed, offset):
    """Numbers that are added to integers of groups before rounding.

    Args:
        groups (Tensor[G]): int64, indices of groups.
        seed (int): 64 bits.
        offset (int): 64 bits.

    Returns:
        Tensor[G]: float32, within 1/2 either way.
    """
    # Counters of signs do not reach the highest bit.
    words = pair_words(groups - 2**63, seed, offset)[:, 0]
    return (words >> 8).float() * 2.0**-24 - (0.5 - 2.0**-25)


def _tree_sum(numbers):
    """Sum over groups (Tensor[G, 256]), of each block of 8 first."""
    numbers = numbers.view(-1, ROTATION // 8, 8)
    while numbers.shape[2] > 1:
        numbers = numbers[..., ::2] + numbers[..., 1::2]
    numbers = numbers[..., 0]
    while numbers.shape[1] > 1:
        first, second = numbers.chunk(2, 1)
        numbers = first + second
    return numbers[:, 0]


def _bfloat16(numbers):
    return numbers.to(torch.bfloat16).float()


def encode(groups, passes, codes_blocked, bits, seed, offset):
    """Codes of coefficients.

    Args:
        groups (Tensor[G, 256]): float32.
        passes (Tensor[G, 256]): bool, whether elements pass a rectifier.
        codes_blocked (bool): Whether those that do not are coded.
        bits (int): Bits of a code, 1 to 3.
        seed (int): 64 bits.
        offset (int): 64 bits.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Codes (Tensor[G, 256], int64), means of
        elements that do not pass and of those that do (Tensor[G, 2],
        float32), and scales (Tensor[G], float32).
    """
    passing = _tree_sum(groups.where(passes, 0.0))
    sums = [_tree_sum(groups) - passing, passing]
    counts = [(~passes).sum(1), passes.sum(1)]
    means = [
        _bfloat16(total * (1.0 / count.float())).where(count != 0, 0.0)
        for total, count in zip(sums, counts)
    ]
    if not codes_blocked:
        means[0] = torch.zeros_like(means[1])
    means = torch.stack(means, 1)
    mean = means[:, 1:].where(passes, means[:, :1])
    rest = (groups - mean).where(passes | codes_blocked, 0.0)
    finite = rest.isfinite().all(1)
    rest = rest.where(finite[:, None], 0.0)
    # Powers of two that make integers of up to 128.
    exponent = rest.abs().amax(1).frexp().exponent
    unit = torch.ldexp(
        torch.ones_like(mean[:, 0]), (7 - exponent).clamp(max=126)
    )
    unit = unit.where(rest.any(1), 2.0**126)
    index = torch.arange(groups.shape[0], device=groups.device)
    shift = offsets(index, seed, offset)[:, None]
    integers = (rest * unit[:, None] + shift).round().long()
    energy = integers.square().sum(1).float()
    negative = negative_signs(index, seed, offset)
    coefficients = transform(
        torch.where(negative, -integers, integers),
        negative,
        # Integers of up to 2 ** 15, of which float16 keeps 11 bits.
        lambda numbers: numbers.half().long(),
    )
    width = torch.tensor(STEPS[bits] * 2 ** (bits + 2))
    factor = (1.0 / (width * energy.sqrt())).where(energy != 0, 0.0)
    # Rounded once: products are exact in float64.
    place = coefficients.double() * factor.double()[:, None] + 0.5
    place = place.float().clamp(0.0, 1.0).double()
    codes = (place * (2**bits * (1 - 2.0**-24))).long()
    levels = 2 * codes - (2**bits - 1)
    product = (coefficients * levels).sum(1).float()
    scale = _bfloat16(energy / product * (1.0 / unit))
    scale = scale.where(energy != 0, 0.0).where(finite, float('nan'))
    return codes, means, scale


def decode(codes, mean, scale, bits, groups, seed, offset):
    """Values of codes.

    Args:
        codes (Tensor[G, 256]): int64.
        mean (Tensor[G, 256]): float32, mean of the kind of each element.
        scale (Tensor[G]): float32.
        bits (int): Bits of a code, 1 to 3.
        groups (Tensor[G]): int64, indices of groups.
        seed (int): 64 bits.
        offset (int): 64 bits.

    Returns:
        Tensor[G, 256]: float32.
    """
    negative = negative_signs(groups, seed, offset)
    multiples = transform(2 * codes - (2**bits - 1), negative)
    multiples = torch.where(negative, -multiples, multiples)
    # Rounded once: the product is exact in float64.
    exact = multiples.double() * scale.double()[:, None] + mean.double()
    return exact.float()
