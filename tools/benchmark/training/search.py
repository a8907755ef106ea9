"""The largest value at which something still fits."""


def search_largest(fits, minimum=1, step=16):
    """Double until it does not fit, then bisect.

    Args:
        fits (Callable): Says for a value whether it fits. If it does, smaller
            values are taken to fit, too.
        minimum (int, optional): No smaller value is tried. Defaults to 1.
        step (int, optional): Only multiples of it are tried. Defaults to 16.

    Returns:
        int, optional: The largest multiple of ``step`` that fits, or None if
        the smallest does not.

    Raises:
        ValueError: If ``step`` or ``minimum`` is not positive.

    Examples:
        >>> search_largest(lambda value: value <= 100)
        96
    """
    for name, value in (('minimum', minimum), ('step', step)):
        if value < 1:
            raise ValueError(f'{name} must be 1 or more, got {value}')
    lowest = -(-minimum // step)
    if not fits(lowest * step):
        return None
    fitting, failing = lowest, 2 * lowest
    while fits(failing * step):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(middle * step):
            fitting = middle
        else:
            failing = middle
    return fitting * step
