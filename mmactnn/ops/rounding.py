"""Ways to round values to codes, and to decode them."""

from .rotation import MAX_ROTATED_BITS, ROTATION

__all__ = ['DEFAULT_ROUNDING', 'ROUNDINGS']

# See `mmactnn.Compression`.
ROUNDINGS = ('rotated', 'dither', 'stochastic')
DEFAULT_ROUNDING = 'dither'


def check_rounding(rounding, group_size, of=''):
    """Check that there are codes for a rounding and a size of groups.

    Args:
        rounding (str): One of ``ROUNDINGS``.
        group_size (int): Elements a range.
        of (str, optional): Whose they are, for the message, such as
            ``" of layer 'conv1'"``. Defaults to ``''``.

    Raises:
        ValueError: If there are none.
    """
    if rounding == 'rotated' and group_size != ROTATION:
        raise ValueError(
            f"rounding='rotated' has groups of {ROTATION} elements: codes of "
            f'1 to {MAX_ROTATED_BITS} bits for values are rotated, others '
            f'have dither. group_size{of} must be {ROTATION}, or rounding '
            f"'dither' or 'stochastic'; got group_size={group_size!r}"
        )
