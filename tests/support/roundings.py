"""Ways to round as arguments of ops."""

from mmactnn import ops
from mmactnn.ops.rotation import ROTATION


def roundings_of(group_size):
    """Roundings that there are codes for.

    Args:
        group_size (int): Elements a range.

    Returns:
        list[str]: Some of ``ops.ROUNDINGS``.
    """
    return [
        rounding
        for rounding in ops.ROUNDINGS
        if rounding != 'rotated' or group_size == ROTATION
    ]


def encoding(rounding, seed, offset, offset_tensor=None):
    """Keyword arguments of an op that encodes.

    Args:
        rounding (str): One of ``ops.ROUNDINGS``.
        seed (int): Key of the random bits.
        offset (int): Counter of the random bits.
        offset_tensor (Tensor[1], optional): Added to it.

    Returns:
        dict: The arguments; what decodes takes :meth:`ops.DrawnBits.of` of
        the same.
    """
    return dict(
        seed=seed,
        offset=offset,
        offset_tensor=offset_tensor,
        rotated=rounding == 'rotated',
    )
