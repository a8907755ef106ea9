"""Rule for rotated codes, as in ``csrc/common/rotation.h``."""

# Elements of a group.
ROTATION = 256
# Most bits for values.
MAX_ROTATED_BITS = 3


def rotates(row_numel, bits):
    """Whether codes that are asked to be rotated are.

    Args:
        row_numel (int): Elements of a sample.
        bits (int): Bits a code for values, without that of a rectifier.

    Returns:
        bool: False if they are rounded and decoded with dither instead.
    """
    return bits <= MAX_ROTATED_BITS and row_numel % ROTATION == 0
