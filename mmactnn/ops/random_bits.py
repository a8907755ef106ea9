"""Random bits as arguments of ops: those to round with, and to decode."""

from typing import NamedTuple

import torch

__all__ = ['DrawnBits']

_MASK64 = (1 << 64) - 1
_SECOND = 1 << 63


class DrawnBits(NamedTuple):
    """Random bits that a tensor was rounded with, for its decoding.

    **Dither.** A value x of a range ``(low, step)`` has the code
    ``q = floor((x - low) / step + u)`` with u uniform on [0, 1). Decoded as
    ``low + (q - u + 1/2) * step`` its error is uniform within half a step
    either way and does not depend on x: the expectation is x and the variance
    ``step ** 2 / 12``, where ``low + q * step`` has up to three times and on
    average twice as much (subtractive dither: L. G. Roberts, "Picture coding
    using pseudo-random noise", 1962). u has 16 bits, at 8-bit codes 15, and
    stands for the middle of its interval.

    Values that lie on a code gain nothing: ``low + q * step`` is exact there.
    Decoders of plain codes therefore leave groups alone whose ``low`` is 0,
    such as those of a rectifier's output.

    **Rotation.** The values of a group, less the mean of those of their kind
    (the elements that a rectifier lets pass, and the others), are rotated by
    Hadamard matrices with random signs between them, and each coefficient is
    rounded to the nearest of ``2 ** bits`` levels. The signs are the random
    bits; codes cannot be decoded without them. The group's mean and the scale
    of its levels take the place of ``low`` and ``step``. The variance at 1, 2
    and 3 bits is about 1/5, 2/5 and 7/10 of dither's, for normally
    distributed values; see ``csrc/common/rotation.h``. Codes with more bits
    for values (zeroed ones with more than one), and those of samples that are
    not whole groups of 256 elements, are rounded and decoded with dither
    instead.

    Attributes:
        seed (int): Key of the random bits, 64 bits.
        offset (int): Counter of the random bits, 64 bits.
        offset_tensor (Tensor[1], optional): int64, as the tensor was rounded
            with; added to ``offset``. Must not have changed since.
        first_row (int): Sample of the tensor that the first row of the codes
            belongs to.
        rotated (bool): Whether the tensor was quantised with
            ``rotated=True``.
    """

    seed: int
    offset: int
    offset_tensor: torch.Tensor | None = None
    first_row: int = 0
    rotated: bool = False

    @classmethod
    def of(cls, rounding, seed, offset, offset_tensor=None):
        """Random bits of a tensor by the way that it was rounded.

        Args:
            rounding (str): See :class:`mmactnn.Compression`.
            seed (int): See the class.
            offset (int): See the class.
            offset_tensor (Tensor[1], optional): See the class.

        Returns:
            DrawnBits, optional: None if codes alone are decoded.
        """
        if rounding == 'stochastic':
            return None
        return cls(seed, offset, offset_tensor, 0, rounding == 'rotated')

    @property
    def numbers(self):
        """tuple[int, int, int]: As :func:`conv_chain_backward` takes it."""
        return 1 + self.rotated, as_int64(self.seed), as_int64(self.offset)

    def second(self):
        """Random bits of the second payload of a call.

        Returns:
            DrawnBits: For ``act_codes`` of :func:`mmactnn.ops.norm_act`.
        """
        return self._replace(offset=self.offset ^ _SECOND)

    def at_row(self, row):
        """Random bits of the samples from ``row`` on.

        Args:
            row (int): Sample, counted from ``first_row``.

        Returns:
            DrawnBits: For codes of these samples.
        """
        return self._replace(first_row=self.first_row + row)


def drawn_arguments(drawn):
    """The last two arguments of ops that decode.

    Args:
        drawn (DrawnBits, optional): Random bits; None: codes alone.

    Returns:
        tuple[list[int], Tensor | None]: Numbers and offset tensor.
    """
    if drawn is None:
        return [], None
    seed, offset, offset_tensor, first_row, rotated = drawn
    numbers = [as_int64(seed), as_int64(offset), first_row, int(rotated)]
    return numbers, offset_tensor


def as_int64(value):
    """The 64 lowest bits of an integer as the op's signed argument."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value
