"""Variance of rounding as a function of bits, to compare bits by."""

from ..ops.rotation import SQUARED_ERRORS

# Mean squared range of 256 normally distributed values, over their variance.
_SQUARED_RANGE = 32.3


def variance_of_normal_values(bits):
    """Variance of rounded values over that of the values of a group.

    For normally distributed values. Rotated codes have, whatever the values
    are, ``D / (1 - D)`` for levels of the squared error D at coefficients of
    variance 1 (``csrc/common/rotation.h``): the decoded rest of the values
    has the rest itself as its projection on it, so that its squared norm is
    ``<r, r> / (1 - D)``. Codes of more bits have dither, and a twelfth of a
    squared step.

    Args:
        bits (int): Bits a code, where rotated codes were asked for.

    Returns:
        float: The ratio.
    """
    if bits in SQUARED_ERRORS:
        return SQUARED_ERRORS[bits] / (1 - SQUARED_ERRORS[bits])
    return _SQUARED_RANGE / 12 / (2**bits - 1) ** 2


def relative_variance(bits, rotated):
    """Variance of rounding over that at one bit.

    Convex in whole bits, so that a greedy allocation is optimal.

    Args:
        bits (float): Bits a code, 1 to 8; of a mean over samples the curve
            between whole numbers.
        rotated (bool): Whether codes are rotated, as far as they are.

    Returns:
        float: 1 at one bit, less at more.
    """
    if not rotated:
        return 1 / (2**bits - 1) ** 2
    whole = min(int(bits), 7)
    here, next_one, one = map(variance_of_normal_values, (whole, whole + 1, 1))
    return here * (next_one / here) ** (bits - whole) / one
