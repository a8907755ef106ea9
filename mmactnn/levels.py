"""Optimisation levels: how many bits each kind of layer keeps."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Level:
    """What the layers of a model keep for the backward pass.

    Attributes:
        name (str): Name, as in ActNN (arXiv:2104.14129, Sec. 5).
        conv (int, optional): Bits an element of a convolution's input. None
            keeps it as torch does.
        norm (int, optional): The same for batch normalisation.
        mask (bool): Whether activations, pooling and dropout keep a few bits
            an element, or nothing, instead of whole tensors. Exact either
            way.
    """

    name: str
    conv: int | None
    norm: int | None
    mask: bool

    @property
    def exact(self):
        """bool: Whether every layer behaves as its torch parent."""
        return self.conv is None and self.norm is None and not self.mask


LEVELS = {
    level.name: level
    for level in (
        # Bit-identical to torch; nothing is compressed.
        Level('L0', conv=None, norm=None, mask=False),
        # Inputs of convolutions only.
        Level('L1', conv=4, norm=None, mask=True),
        Level('L2', conv=4, norm=4, mask=True),
        Level('L3', conv=2, norm=2, mask=True),
    )
}
DEFAULT_LEVEL = LEVELS['L3']


def get_level(level):
    """A level by name.

    Args:
        level (str | Level): ``'L0'``, ``'L1'``, ``'L2'``, ``'L3'`` or a
            :class:`Level` of one's own.

    Returns:
        Level: The level.

    Raises:
        ValueError: If there is no level of that name.
        TypeError: If it is neither a name nor a level.
    """
    if isinstance(level, Level):
        return level
    if not isinstance(level, str):
        raise TypeError(
            f'level must be a name or a Level, got {type(level).__name__}'
        )
    if level not in LEVELS:
        raise ValueError(
            f'level must be one of {", ".join(LEVELS)}, got {level!r}'
        )
    return LEVELS[level]
