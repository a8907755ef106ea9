"""Settings of a model: compression, execution and offload."""

import dataclasses
import difflib
import fnmatch
import math
import numbers
from collections.abc import Mapping

from .ops import DEFAULT_ROUNDING, GROUP_SIZES, ROUNDINGS, VALID_BITS

# Former names of settings, which are shorter.
ALIASES = dict(
    conv='linear_ops',
    mask='lossless_activations',
    rectified='relu_bits',
    head='conv_module',
)
_SHORT = {name: alias for alias, name in ALIASES.items()}

# Bits of a rule that does not set them; None already means exact.
SAME_BITS = 'same'


class _Invalid(Exception):
    """Failure of a check, with the expected value and the error to raise."""


def checked(name, value, check, optional=False):
    """Check a setting.

    All settings of levels, rules and hooks are checked by this function.

    Args:
        name (str): Name of the setting, for the message.
        value (object): Its value.
        check (Callable): One of the functions below; returns the value.
        optional (bool, optional): Whether None is valid as it is. Defaults
            to False.

    Returns:
        object: The value, in the type that the package uses.

    Raises:
        TypeError: If the type is never valid.
        ValueError: If the value is not valid.
    """
    if optional and value is None:
        return None
    try:
        return check(value)
    except _Invalid as invalid:
        expected, error = invalid.args
        none = 'None or ' if optional else ''
        message = f'{name} must be {none}{expected}, got {value!r}'
    raise error(message)


def check_count(value):
    """Check a positive number, such as one of iterations."""
    if _is_number(value, numbers.Integral) and value >= 1:
        return int(value)
    raise _invalid_number(value, 'a whole number of 1 or more')


def check_flag(value):
    """Check a switch."""
    if isinstance(value, bool):
        return value
    raise _Invalid('True or False', TypeError)


def _check_mean_bits(value):
    """Check bits that may be a mean over several layers."""
    if _is_number(value, numbers.Real) and 1 <= value <= 8:
        # 2.0 and 2 are the same setting and need the same name.
        return int(value) if value == int(value) else float(value)
    raise _invalid_number(value, 'a number that lies within 1 and 8')


def _check_bits(value):
    if _is_number(value, numbers.Integral) and value in VALID_BITS:
        return int(value)
    raise _invalid_number(value, 'a whole number from 1 to 8')


def _check_relu_bits(value):
    # One of the bits is the sign.
    if _is_number(value, numbers.Integral) and 2 <= value <= 8:
        return int(value)
    raise _invalid_number(value, 'a whole number from 2 to 8')


def _check_limit(value):
    if _is_number(value, numbers.Real) and 0 < value < math.inf:
        return value
    raise _invalid_number(value, 'finite and positive')


def _check_group_size(value):
    if _is_number(value, numbers.Integral) and value in GROUP_SIZES:
        return int(value)
    sizes = ', '.join(map(str, GROUP_SIZES))
    raise _invalid_number(value, f'one of {sizes}')


def _check_rules(value):
    """Make a tuple of rules from any form that configs have."""
    if isinstance(value, Mapping):
        return tuple(_make_rule(*item) for item in value.items())
    if isinstance(value, (list, tuple)) and all(
        isinstance(rule, Rule) for rule in value
    ):
        return tuple(value)
    expected = 'a dict from patterns of names to bits, or a list of Rules'
    raise _Invalid(expected, TypeError)


def _check_rounding(value):
    if value in ROUNDINGS:
        return value
    error = ValueError if isinstance(value, str) else TypeError
    raise _Invalid(' or '.join(map(repr, ROUNDINGS)), error)


def _is_number(value, kind):
    return isinstance(value, kind) and not isinstance(value, bool)


def _invalid_number(value, expected):
    """Error for an invalid value: ValueError for numbers, else TypeError."""
    error = ValueError if _is_number(value, numbers.Real) else TypeError
    return _Invalid(expected, error)


def _assign(instance, **values):
    """Set the attributes of a frozen object that is being made."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


@dataclasses.dataclass(frozen=True, init=False)
class Rule:
    """Settings that override the level's for layers by name.

    Attributes:
        pattern (str): Glob pattern of qualified names (``'backbone.*'``).
        bits (int | str, optional): Bits an element. None keeps the input
            exactly. ``'same'`` leaves the bits to an earlier rule that
            matches, else to the level. Defaults to ``'same'`` with a
            ``group_size`` and to None without.
        group_size (int, optional): Elements a range: 64, 128, 256 or 512.
            None follows the model.

    Raises:
        ValueError, TypeError: If a value is not valid.
    """

    pattern: str
    bits: int | str | None
    group_size: int | None

    def __init__(self, pattern, bits=dataclasses.MISSING, group_size=None):
        if not isinstance(pattern, str):
            raise TypeError(
                'the pattern of a rule must be a str such as '
                f"'backbone.*', got {pattern!r}"
            )
        of = f'of the rule for {pattern!r}'
        if bits is dataclasses.MISSING:
            bits = None if group_size is None else SAME_BITS
        if bits != SAME_BITS:
            bits = checked(f'bits {of}', bits, _check_bits, optional=True)
        group_size = checked(
            f'group_size {of}', group_size, _check_group_size, optional=True
        )
        _assign(self, pattern=pattern, bits=bits, group_size=group_size)

    @property
    def sets_bits(self):
        """bool: Whether the rule sets bits."""
        return self.bits != SAME_BITS


def _make_rule(pattern, value):
    if not isinstance(value, Mapping):
        return Rule(pattern, bits=value)
    odd = sorted(map(str, value.keys() - {'bits', 'group_size'}))
    if odd or not value:
        raise ValueError(
            f'the rule for {pattern!r} must be bits, None (exact) or a dict '
            f'of bits and group_size, got {dict(value)!r}'
        )
    return Rule(pattern, **value)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Group of settings, checked by the table of its class."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = checked(
                field.metadata['label'],
                getattr(self, field.name),
                field.metadata['check'],
                field.default is None,
            )
            object.__setattr__(self, field.name, value)


def _setting(default, check, label):
    metadata = dict(check=check, label=label)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Compression(_Settings):
    """Bits of the tensors that are kept for the backward pass.

    Attributes:
        linear_ops (float, optional): Bits an element of the input of
            convolutions and linear layers; None keeps it as torch does. A
            mean if ``adaptive``, else a whole number from 1 to 8.
        norm (float, optional): Bits an element of the input of normalisation
            layers, likewise.
        act (int, optional): Bits an element of the derivative of smooth
            activations (SiLU), the same for all; None keeps their input as
            torch does. The noise of its rounding reaches every layer before
            and adds up over the activations of a deep model. It should
            therefore exceed ``linear_ops`` and ``norm``.
        attention (int, optional): Bits an element of queries and keys of
            softmax attention, whose scores the backward pass computes again
            from them; None keeps what torch does. Rounding of queries and
            keys reaches the gradient through the softmax, so that it has a
            bias of second order in the step: it should be at least 3.
        attention_value (int, optional): Bits an element of values of
            attention, in whose gradients they enter linearly; without effect
            where ``attention`` is None. None is ``attention``.
        act (int, optional): Bits an element of smooth activations (GELU,
            SiLU), the same for all; None keeps their input as torch does. The
            noise of its rounding reaches every layer before and adds up over
            the activations of a deep model. It should therefore exceed
            ``linear_ops`` and ``norm``.
        joint_act (bool): Whether smooth activations keep codes of their input
            where one code serves two: the derivative, and the input of a
            convolution or linear layer that follows, which is decoded from
            it. Holds for GELU, SiLU, Mish and Softplus at 3 bits and more,
            unless rounding is ``'stochastic'``. Else they keep codes of their
            derivative, whose error is a third, and the next layer keeps codes
            of its own.
        lossless_activations (bool): Whether activations, pooling and dropout
            keep masks, positions, shapes or seeds instead of tensors. Exact
            either way.
        relu_bits (int): Bits an element, 2 to 8 with the sign, of a
            normalised value before a fused ReLU.
        conv_module (int, optional): Bits that replace ``relu_bits``, if they
            are more, in MMCV's ``ConvModule``, of which many heads consist.
            These keep few tensors, but are close to the loss, and their noise
            adds up over the levels of a pyramid. None is ``relu_bits``.
        image (int, optional): Bits an element of images (the input of a
            convolution of at most four channels) in a model with fused
            blocks, where few layers have adaptive bits and images would get
            too few of them. None treats them as other inputs.
        adaptive (bool): Whether bits are allocated by their benefit: to
            layers, and to the samples of each layer.
        use_gradient (bool): Whether bits of samples depend on their gradients
            in earlier epochs as well as on their ranges. Needs sample
            indices, see :class:`mmactnn.AdaptivePrecision`.
        rounding (str): ``'stochastic'`` rounds to one of the two nearest
            codes at random. ``'dither'`` does so, too, and subtracts the
            random number again when it decodes: half the variance at the
            same bits. ``'rotated'`` turns groups of 256 values by a random
            rotation and rounds to the nearest code, where 1 to 3 bits are
            for values: 1/5 to 7/10 of the variance of dither, which other
            codes have. See :class:`mmactnn.ops.DrawnBits`. All are unbiased,
            ``'rotated'`` but for a rest that is small unless few values of a
            group are much larger than all others. Needs a ``group_size`` of
            256.
        channel_means (bool): Whether the means of the channels of inputs of
            linear layers are kept in float32, and codes are those of what
            differs from them: less noise at the same bits where means are
            large, as behind a ReLU or a GELU, for another pass over the
            input and 4 bytes a channel.
        rules (tuple[Rule]): Exceptions by name of layer, or a dict of them,
            see :func:`get_level`; of several rules that match the last one
            applies. Rules have no effect at an exact level.

    Raises:
        ValueError, TypeError: If a value is not valid.
    """

    linear_ops: float | None = _setting(
        None, _check_mean_bits, 'linear_ops (conv) bits'
    )
    norm: float | None = _setting(None, _check_mean_bits, 'norm bits')
    lossless_activations: bool = _setting(
        False, check_flag, 'lossless_activations (mask)'
    )
    act: int | None = _setting(None, _check_bits, 'act bits')
    attention: int | None = _setting(None, _check_bits, 'attention bits')
    attention_value: int | None = _setting(
        None, _check_bits, 'attention_value bits'
    )
    joint_act: bool = _setting(True, check_flag, 'joint_act')
    relu_bits: int = _setting(4, _check_relu_bits, 'relu_bits (rectified)')
    conv_module: int | None = _setting(
        None, _check_relu_bits, 'conv_module (head) bits'
    )
    image: int | None = _setting(None, _check_bits, 'image bits')
    adaptive: bool = _setting(False, check_flag, 'adaptive')
    use_gradient: bool = _setting(False, check_flag, 'use_gradient')
    rounding: str = _setting(DEFAULT_ROUNDING, _check_rounding, 'rounding')
    channel_means: bool = _setting(False, check_flag, 'channel_means')
    rules: tuple = _setting((), _check_rules, 'rules')

    def __post_init__(self):
        super().__post_init__()
        for name in ('linear_ops', 'norm'):
            bits = getattr(self, name)
            if bits is not None and bits != int(bits) and not self.adaptive:
                raise ValueError(
                    f'{_SHORT.get(name, name)} bits must be a whole number '
                    f'unless adaptive is True, got {bits!r}'
                )
        if self.use_gradient and not self.adaptive:
            raise ValueError(
                'use_gradient=True needs an adaptive level, got adaptive=False'
            )

    @property
    def exact(self):
        """bool: Whether every layer behaves as its torch parent."""
        coded = self.linear_ops, self.norm, self.act, self.attention
        return not any(coded) and not self.lossless_activations


@dataclasses.dataclass(frozen=True)
class Execution(_Settings):
    """Execution of compressed layers.

    Attributes:
        fuse (bool): Whether normalisation, addition and ReLU of blocks run
            fused and share a payload (:mod:`mmactnn.fusion`). Their bits are
            those of ``norm`` and ``linear_ops``, rounded down, and
            ``relu_bits``.
        chunk_mib (float, optional): Most MiB (2^20 bytes) of input that the
            backward pass of a convolution processes at once. A larger input
            is decoded, and its gradient computed, piece by piece, with
            workspaces of the size of a piece. None is no limit.
        recompute (bool): Whether repeated blocks that keep much run again in
            the backward pass, from 8-bit codes of their inputs
            (:mod:`mmactnn.segments`). Has no effect at an exact level.

    Raises:
        ValueError, TypeError: If a value is not valid.
    """

    fuse: bool = _setting(True, check_flag, 'fuse')
    chunk_mib: float | None = _setting(None, _check_limit, 'chunk_mib')
    recompute: bool = _setting(False, check_flag, 'recompute')


@dataclasses.dataclass(frozen=True)
class Offload(_Settings):
    """Memory in which kept tensors wait for the backward pass.

    Attributes:
        swap (bool): Whether kept tensors move to pinned host memory.
        max_host_mib (float, optional): Most MiB of host memory to pin. None
            is 80 % of the available memory.
        expandable (bool): Whether the caching allocator must use expandable
            segments, against fragmentation.

    Raises:
        ValueError, TypeError: If a value is not valid.
    """

    swap: bool = _setting(False, check_flag, 'swap')
    max_host_mib: float | None = _setting(None, _check_limit, 'max_host_mib')
    expandable: bool = _setting(False, check_flag, 'expandable')


_PARTS = dict(compression=Compression, execution=Execution, offload=Offload)

# Part of a level by setting.
_PART_OF = {
    field.name: part
    for part, cls in _PARTS.items()
    for field in dataclasses.fields(cls)
}

# Former order of the arguments of Level.
_POSITIONAL = (
    'conv',
    'norm',
    'mask',
    'act',
    'fuse',
    'rectified',
    'head',
    'image',
    'adaptive',
    'use_gradient',
    'chunk_mib',
    'swap',
    'max_host_mib',
    'expandable',
    'rules',
)


def _by_part(changes):
    """Settings by the part that they belong to, under their standard names."""
    found = {part: {} for part in _PARTS}
    for key, value in changes.items():
        setting = ALIASES.get(key, key)
        if setting not in _PART_OF:
            known = ['base', 'name', *_PARTS, *_PART_OF, *ALIASES]
            close = difflib.get_close_matches(key, known, 1)
            advice = f', did you mean {close[0]!r}?' if close else ''
            raise ValueError(
                f'a level has the fields {", ".join(known)}; got {key!r}'
                + advice
            )
        part = found[_PART_OF[setting]]
        if setting in part:
            raise ValueError(
                f'{_SHORT[setting]} and {setting} are names of one setting; '
                'give one of them'
            )
        part[setting] = value
    return found


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Level:
    """All settings of a model, in three parts.

    Attributes:
        name (str): Name, as in ActNN (arXiv:2104.14129, Sec. 5).
        compression (Compression): Bits of kept tensors.
        execution (Execution): Execution of compressed layers.
        offload (Offload): Memory of kept tensors.

    Each setting is also an attribute and an argument by itself, under its
    name in its part or the former one: ``conv`` (``linear_ops``), ``mask``
    (``lossless_activations``), ``rectified`` (``relu_bits``) and ``head``
    (``conv_module``). Without ``compression``, the bits of convolutions and
    normalisations and ``mask`` must be given.

    Args:
        name (str): See above.
        *settings (object): Settings in their former order, from ``conv`` on.
        compression (Compression, optional): Defaults to an exact one.
        execution (Execution, optional): Defaults to its defaults.
        offload (Offload, optional): Defaults to its defaults.
        **changes (object): Settings that differ from those of the parts.

    Raises:
        ValueError, TypeError: If a value is not valid.

    Examples:
        >>> Level('mine', conv=4, norm=4, mask=True).compression.linear_ops
        4
    """

    name: str
    compression: Compression
    execution: Execution
    offload: Offload

    def __init__(
        self,
        name,
        *settings,
        compression=None,
        execution=None,
        offload=None,
        **changes,
    ):
        if not isinstance(name, str):
            raise TypeError(f'name of a level must be a str, got {name!r}')
        if len(settings) > len(_POSITIONAL):
            raise TypeError(
                f'a level has {len(_POSITIONAL)} settings, got {len(settings)}'
            )
        for key, value in zip(_POSITIONAL, settings):
            if key in changes:
                raise TypeError(f'level {name} got {key} twice')
            changes[key] = value
        try:
            changes = _by_part(changes)
        except ValueError as error:
            raise TypeError(str(error)) from None
        required = dict.fromkeys(
            ('linear_ops', 'norm', 'lossless_activations')
        )
        missing = required.keys() - changes['compression'].keys()
        if compression is None and missing:
            names = sorted(_SHORT.get(key, key) for key in missing)
            raise TypeError(f'level {name} lacks {", ".join(names)}')
        parts = dict(
            compression=compression, execution=execution, offload=offload
        )
        for part, cls in _PARTS.items():
            value = cls() if parts[part] is None else parts[part]
            if not isinstance(value, cls):
                raise TypeError(
                    f'{part} of level {name} must be of class {cls.__name__}, '
                    f'got {value!r}'
                )
            parts[part] = dataclasses.replace(value, **changes[part])
        _assign(self, name=name, **parts)

    def __getattr__(self, name):
        # Only called for names that are no fields: settings of the parts.
        setting = ALIASES.get(name, name)
        if setting not in _PART_OF:
            raise AttributeError(
                f'{type(self).__name__!r} object has no attribute {name!r}'
            )
        return getattr(getattr(self, _PART_OF[setting]), setting)

    def __repr__(self):
        parts = (self.compression, self.execution, self.offload)
        return f'Level({self.name!r}, {", ".join(map(repr, parts))})'

    @property
    def exact(self):
        """bool: Whether every layer behaves as its torch parent."""
        return self.compression.exact

    def rule_for(self, name):
        """Find the rule for a layer.

        Args:
            name (str): Qualified name of the layer.

        Returns:
            Rule, optional: The last one that matches. If it sets no bits,
            these come from the last matching rule that does.
        """
        if self.exact:
            return None
        matching = [
            rule
            for rule in self.rules
            if fnmatch.fnmatchcase(name, rule.pattern)
        ]
        if not matching:
            return None
        last = matching[-1]
        for rule in reversed(matching):
            if rule.sets_bits:
                return dataclasses.replace(last, bits=rule.bits)
        return last


_L3 = Level(
    'L3',
    conv=2,
    norm=2,
    mask=True,
    act=4,
    attention=4,
    attention_value=2,
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
        # Inputs of convolutions and linear layers only, and derivatives and
        # attention, whose noise propagates and is therefore kept small.
        Level(
            'L1',
            conv=4,
            norm=None,
            mask=True,
            act=8,
            attention=8,
            chunk_mib=256,
        ),
        Level(
            'L2',
            conv=4,
            norm=4,
            mask=True,
            act=4,
            attention=6,
            attention_value=4,
            chunk_mib=256,
        ),
        _L3,
        # The least memory: rotated codes, whose error at a bit for values is
        # bearable. One bit of those of rectified values is the mask.
        dataclasses.replace(
            _L3,
            name='L3S',
            norm=1,
            rectified=2,
            rounding='rotated',
        ),
        # Blocks that fusing does not serve are recomputed from 8 bits; other
        # layers have enough bits not to spoil their gradients.
        dataclasses.replace(
            _L3,
            name='L3R',
            conv=4,
            norm=3,
            rectified=4,
            attention=6,
            attention_value=4,
            execution=dataclasses.replace(_L3.execution, recompute=True),
        ),
        # As L3, in smaller pieces: a lower peak, and more calls.
        dataclasses.replace(_L3, name='L3.1', chunk_mib=64),
        # As L3, and the codes wait in host memory.
        dataclasses.replace(_L3, name='L4', swap=True),
        # As L4, on an allocator that does not fragment.
        dataclasses.replace(_L3, name='L5', swap=True, expandable=True),
        # Bit-identical to torch, with kept tensors in host memory.
        Level('swap', conv=None, norm=None, mask=False, swap=True),
    )
}
DEFAULT_LEVEL = LEVELS['L3']


def get_level(level):
    """Get a level by name, or make a variation of one.

    A variation without a ``name`` is named after its base and the changes, as
    in ``L3(conv=2.5,norm=2.5)``. If all of its settings equal those of a named
    level, it has the name of that level.

    Args:
        level (str | dict | Level): Name of one of :data:`LEVELS`; a level; or
            a dict of settings that differ from those of the level ``base`` (a
            name, a dict or a level, by default ``'L3'``), by themselves or in
            dicts ``compression``, ``execution`` and ``offload``. ``rules``
            may be a dict from patterns to bits, to None (exact) or to dicts
            of ``bits`` and ``group_size``.

    Returns:
        Level: The level.

    Raises:
        ValueError: If there is no level of that name, no such setting, or a
            value is not valid.
        TypeError: If ``level`` or a value has no valid type.

    Examples:
        >>> get_level(dict(base='L3', conv=2.5, rules={'head.*': 4})).conv
        2.5
    """
    if isinstance(level, Level):
        return level
    if isinstance(level, Mapping):
        return _vary(**_with_string_keys(level))
    if not isinstance(level, str):
        raise TypeError(
            'level must be a name, a dict or a Level, got '
            f'{type(level).__name__} {level!r}'
        )
    if level not in LEVELS:
        raise ValueError(
            f'level must be one of {", ".join(LEVELS)}, got {level!r}'
        )
    return LEVELS[level]


def settings_of(level):
    """Compression settings of a level as plain data, for checkpoints.

    Args:
        level (Level): The level.

    Returns:
        dict: The settings of its ``compression``.
    """
    return dataclasses.asdict(level.compression)


def _vary(base=DEFAULT_LEVEL.name, name=None, **changes):
    base = get_level(base)
    nested = {part: changes.pop(part) for part in _PARTS if part in changes}
    for part, settings in nested.items():
        if dataclasses.is_dataclass(settings):
            settings = {
                field.name: getattr(settings, field.name)
                for field in dataclasses.fields(settings)
            }
        if not isinstance(settings, Mapping):
            raise TypeError(f'{part} must be a dict, got {settings!r}')
        for key, value in _with_string_keys(settings).items():
            if key in changes:
                raise ValueError(
                    f'{key} is set twice, by itself and in {part}'
                )
            if _PART_OF.get(ALIASES.get(key, key), part) != part:
                raise ValueError(
                    f'{key} is no setting of {part}, but of '
                    f'{_PART_OF[ALIASES.get(key, key)]}'
                )
            changes[key] = value
    parts = {
        part: dataclasses.replace(getattr(base, part), **settings)
        for part, settings in _by_part(changes).items()
    }
    if name is None:
        name = _canonical_name(base, parts)
    return Level(name, **parts)


def _with_string_keys(mapping):
    for key in mapping:
        if not isinstance(key, str):
            raise TypeError(f'settings have names, got {key!r}')
    return dict(mapping)


def _canonical_name(base, parts):
    """Name of a level by its settings, equal for equal settings."""
    for level in LEVELS.values():
        if all(getattr(level, part) == parts[part] for part in parts):
            return level.name
    root = LEVELS.get(base.name.split('(')[0], base)
    changed = [
        f'{_SHORT.get(setting, setting)}={_text(value)}'
        for setting, part in _PART_OF.items()
        if (value := getattr(parts[part], setting))
        != getattr(getattr(root, part), setting)
    ]
    return f'{root.name}({",".join(changed)})' if changed else root.name


def _text(value):
    if not isinstance(value, tuple):
        return repr(value)
    rules = (
        f'{rule.pattern!r}:'
        + (repr(rule.bits) if rule.sets_bits else rule.bits)
        + ('' if rule.group_size is None else f'/{rule.group_size}')
        for rule in value
    )
    return '{' + ','.join(rules) + '}'
