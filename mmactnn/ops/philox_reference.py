"""Counter-based random bits in plain torch, as in ``csrc/common/philox.h``.

J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11,
Sec. 2.2.
"""

import torch

from ..random import GOLDEN64, mix64

_PHILOX_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PAIR_MULTIPLIER = 0xD256D193
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox(blocks, seed, offset):
    """Random words of Philox4x32-7.

    Args:
        blocks (Tensor[B]): int64, lower half of the counter.
        seed (int): Key, 64 bits.
        offset (int): Upper half of the counter, 64 bits.

    Returns:
        Tensor[B, 4]: int64 of 32 random bits each.
    """
    c = [
        blocks & _MASK32,
        (blocks >> 32) & _MASK32,
        torch.full_like(blocks, offset & _MASK32),
        torch.full_like(blocks, (offset >> 32) & _MASK32),
    ]
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply(c[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(c[2], _MULTIPLIERS[1])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack(c, dim=-1)


def _multiply(a, constant):
    """Both halves of a product of 32-bit numbers."""
    # By halves of the constant, as 64-bit products do not fit into int64.
    low = a * (constant & 0xFFFF)
    high = a * (constant >> 16)
    product_high = (high + (low >> 16)) >> 16
    product_low = (((high & 0xFFFF) << 16) + low) & _MASK32
    return product_high, product_low


def philox_pair(counter, key):
    """Random words of Philox2x32-7, see :func:`philox`.

    Args:
        counter (tuple[Tensor[B], Tensor[B]]): int64, halves of 32 bits.
        key (int): 32 bits.

    Returns:
        Tensor[B, 2]: int64 of 32 random bits each.
    """
    c0, c1 = counter
    for _ in range(_PHILOX_ROUNDS):
        high, low = _multiply(c0, _PAIR_MULTIPLIER)
        c0, c1 = high ^ key ^ c1, low
        key = (key + _WEYL[0]) & _MASK32
    return torch.stack([c0, c1], dim=-1)


def pair_words(blocks, seed, offset):
    """Random words of Philox2x32-7, for rounding.

    Args:
        blocks (Tensor[B]): int64, the counter.
        seed (int): 64 bits.
        offset (int): 64 bits.

    Returns:
        Tensor[B, 2]: int64 of 32 random bits each.
    """
    stream = mix64(seed + (offset + 1) * GOLDEN64)
    counter = blocks & _MASK32, (blocks >> 32 ^ stream) & _MASK32
    return philox_pair(counter, stream >> 32)
