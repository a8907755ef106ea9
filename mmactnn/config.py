"""Optimisation levels: what each kind of layer keeps, and where."""

import dataclasses
import fnmatch

from .ops import VALID_BITS


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the layers of some names keep, whatever the level says.

    Attributes:
        pattern (str): Glob pattern of qualified names (``'backbone.*'``).
        bits (int, optional): Bits an element. None keeps the input exactly.
        group_size (int, optional): Elements a range. None follows the model.

    Raises:
        ValueError: If ``bits`` is not a width that there are codes of.
    """

    pattern: str
    bits: int | None = None
    group_size: int | None = None

    def __post_init__(self):
        if self.bits is not None and self.bits not in VALID_BITS:
            raise ValueError(
                f'bits of the rule for {self.pattern!r} must be None (exact) '
                f'or one of {VALID_BITS}, got {self.bits!r}'
            )


@dataclasses.dataclass(frozen=True)
class Level:
    """What the layers of a model keep for the backward pass.

    Attributes:
        name (str): Name, as in ActNN (arXiv:2104.14129, Sec. 5).
        conv (float, optional): Bits an element of the input of convolutions
            and linear layers; None keeps it as torch does. A mean if
            ``adaptive``, else a whole number from 1 to 8.
        norm (float, optional): The same for normalisation layers.
        act (int, optional): Bits an element of the derivative of smooth
            activations (SiLU); None keeps their input as torch does. What is
            rounded here is noise to every layer before, and in a deep model
            adds up over the activations: more than ``conv`` and ``norm``, and
            the same for all.
        mask (bool): Whether activations, pooling and dropout keep masks,
            positions, shapes or seeds instead of tensors. Exact either way.
        fuse (bool): Whether normalisation, addition and ReLU of known blocks
            run as one and share a payload (:mod:`mmactnn.fusion`). Their bits
            are those of ``norm`` and ``conv``, rounded down, and
            ``rectified``.
        rectified (int): Bits an element of what a fused ReLU makes of a
            normalised value, the sign included: 2 to 8.
        head (int, optional): The same, if it is more, in MMCV's
            ``ConvModule``, of which many heads are made. They are a
            small part of what is kept; few blocks lie between them and the
            loss, and over the levels of a pyramid their noise adds up.
            Defaults to ``rectified``.
        image (int, optional): Bits an element of images (of what a
            convolution of at most four input channels reads) in a model with
            fused blocks. Of the few layers that share out bits there they
            would get too few. None keeps them as other inputs.
        adaptive (bool): Whether bits are shared out by what they are worth:
            among layers, and among the samples of each layer.
        use_gradient (bool): Whether the shares of samples follow their
            gradients in earlier epochs as well as their ranges. Takes sample
            indices, see :class:`mmactnn.AdaptivePrecision`.
        chunk_mib (float, optional): Most MiB (2^20 bytes) of input that the
            backward pass of a convolution takes at once: it decodes a larger
            one and computes its gradient piece by piece, in workspaces of the
            size of a piece. None takes all.
        swap (bool): Whether what is kept moves to pinned host memory.
        max_host_mib (float, optional): Most MiB of host memory to pin.
            Defaults to 80 % of what is available.
        expandable (bool): Whether the caching allocator must be set to grow
            its segments, against fragmentation.
        rules (tuple[Rule]): Exceptions by name of layer; the last that
            matches counts. None of them touches an exact level.

    Raises:
        ValueError: If the bits do not lie within 1 and 8, are no whole
            number where nothing is adaptive, or a limit is not positive.
    """

    name: str
    conv: float | None
    norm: float | None
    mask: bool
    act: int | None = None
    fuse: bool = True
    rectified: int = 4
    head: int | None = None
    image: int | None = None
    adaptive: bool = False
    use_gradient: bool = False
    chunk_mib: float | None = None
    swap: bool = False
    max_host_mib: float | None = None
    expandable: bool = False
    rules: tuple = ()

    def __post_init__(self):
        for field in ('conv', 'norm'):
            bits = getattr(self, field)
            if bits is None:
                continue
            if not 1 <= bits <= 8:
                raise ValueError(
                    f'{field} bits of level {self.name} must lie within 1 '
                    f'and 8, got {bits!r}'
                )
            if not self.adaptive and bits != int(bits):
                raise ValueError(
                    f'{field} bits of level {self.name} must be a whole '
                    f'number unless the level is adaptive, got {bits!r}'
                )
        for field in ('rectified', 'head'):
            bits = getattr(self, field)
            optional = field == 'head' and bits is None
            if not optional and bits not in range(2, 9):
                raise ValueError(
                    f'{field} bits of level {self.name} must be a whole '
                    f'number from 2 to 8, got {bits!r}'
                )
        for field in ('act', 'image'):
            bits = getattr(self, field)
            if bits is not None and bits not in VALID_BITS:
                raise ValueError(
                    f'{field} bits of level {self.name} must be None or a '
                    f'whole number from 1 to 8, got {bits!r}'
                )
        if self.use_gradient and not self.adaptive:
            raise ValueError(
                f'use_gradient needs an adaptive level, {self.name} is not'
            )
        for field in ('chunk_mib', 'max_host_mib'):
            limit = getattr(self, field)
            if limit is not None and limit <= 0:
                raise ValueError(f'{field} must be positive, got {limit!r}')

    @property
    def exact(self):
        """bool: Whether every layer behaves as its torch parent."""
        coded = self.conv, self.norm, self.act
        return coded == (None, None, None) and not self.mask

    def rule_for(self, name):
        """The rule that holds for a layer.

        Args:
            name (str): Qualified name of the layer.

        Returns:
            Rule, optional: The last that matches.
        """
        if self.exact:
            return None
        for rule in reversed(self.rules):
            if fnmatch.fnmatchcase(name, rule.pattern):
                return rule
        return None


_L3 = Level(
    'L3',
    conv=2,
    norm=2,
    mask=True,
    act=4,
    rectified=3,
    head=4,
    image=8,
    adaptive=True,
    chunk_mib=256,
)

LEVELS = {
    level.name: level
    for level in (
        # Bit-identical to torch; nothing is compressed.
        Level('L0', conv=None, norm=None, mask=False),
        # Inputs of convolutions and linear layers only, and derivatives, of
        # which the noise goes on and is therefore kept small.
        Level('L1', conv=4, norm=None, mask=True, act=8, chunk_mib=256),
        Level('L2', conv=4, norm=4, mask=True, act=4, chunk_mib=256),
        _L3,
        # As L3, in smaller pieces: a lower peak, and more calls.
        dataclasses.replace(_L3, name='L3.1', chunk_mib=64),
        # As L3, and the codes wait in host memory.
        dataclasses.replace(_L3, name='L4', swap=True),
        # As L4, on an allocator that does not fragment.
        dataclasses.replace(_L3, name='L5', swap=True, expandable=True),
        # Bit-identical to torch; what it keeps waits in host memory.
        Level('swap', conv=None, norm=None, mask=False, swap=True),
    )
}
DEFAULT_LEVEL = LEVELS['L3']


def get_level(level):
    """A level by name, or a variation of one.

    Args:
        level (str | dict | Level): One of :data:`LEVELS` by name; a dict of
            fields of :class:`Level` that differ from the level named
            ``base`` (by default ``'L3'``), where ``rules`` may be a dict
            from patterns to bits, to None (exact) or to dicts of ``bits``
            and ``group_size``; or a level itself.

    Returns:
        Level: The level.

    Raises:
        ValueError: If there is no level of that name, no such field, or a
            value is not valid.
        TypeError: If it is nothing of these.

    Examples:
        >>> get_level(dict(base='L3', conv=2.5, rules={'head.*': 4})).conv
        2.5
    """
    if isinstance(level, Level):
        return level
    if isinstance(level, dict):
        return _vary(**level)
    if not isinstance(level, str):
        raise TypeError(
            'level must be a name, a dict or a Level, got '
            f'{type(level).__name__}'
        )
    if level not in LEVELS:
        raise ValueError(
            f'level must be one of {", ".join(LEVELS)}, got {level!r}'
        )
    return LEVELS[level]


def _vary(base=DEFAULT_LEVEL.name, **changes):
    base = get_level(base)
    known = [field.name for field in dataclasses.fields(Level)]
    for key in changes:
        if key not in known:
            raise ValueError(
                f'a level has the fields base, {", ".join(known)}; got {key!r}'
            )
    rules = changes.get('rules', ())
    if isinstance(rules, dict):
        rules = [_make_rule(*item) for item in rules.items()]
    # A name of its own, lest a log calls it what it is not.
    changes.setdefault('name', f'{base.name}*' if changes else base.name)
    return dataclasses.replace(base, **{**changes, 'rules': tuple(rules)})


def _make_rule(pattern, value):
    if isinstance(value, dict):
        return Rule(pattern, **value)
    return Rule(pattern, bits=value)
