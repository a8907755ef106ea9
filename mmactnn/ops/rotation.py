"""Rule for rotated codes, as in ``csrc/common/rotation.h``."""

# Elements of a group.
ROTATION = 256
# Distances of the levels for the standard normal distribution and their
# squared error, by bits: J. Max, "Quantizing for minimum distortion", 1960,
# Table II.
STEPS = {1: 1.5958, 2: 0.9957, 3: 0.5860}
SQUARED_ERRORS = {1: 0.3634, 2: 0.1188, 3: 0.03744}
# Most bits for values.
MAX_ROTATED_BITS = max(STEPS)


def rotates(row_numel, bits):
    """Whether codes that are asked to be rotated are.

    Args:
        row_numel (int): Elements of a sample.
        bits (int): Bits a code for values, without that of a rectifier.

    Returns:
        bool: False if they are rounded and decoded with dither instead.
    """
    return bits <= MAX_ROTATED_BITS and row_numel % ROTATION == 0


def rotates_zeroed(row_numel, bits):
    """The same of zeroed codes.

    With more bits for values than one, dither has less variance.

    Args:
        row_numel (int): Elements of a sample.
        bits (int): Bits a code, with that of the rectifier.

    Returns:
        bool: As of :func:`rotates`.
    """
    return bits == 2 and rotates(row_numel, 1)
