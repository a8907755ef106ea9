"""Report of a conversion."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Converted:
    """A layer that is compressed.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class before.
        target (str): Class now.
        bits (float, optional): Bits an element; 0 where nothing is kept; None
            if it keeps as much as torch's layer.
        adaptive (bool): Whether the bits are adaptive, and ``bits`` a mean.
    """

    name: str
    source: str
    target: str
    bits: float | None
    adaptive: bool


@dataclasses.dataclass(frozen=True)
class Left:
    """A layer that is not compressed.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class of the layer.
        reason (str): Reason for leaving it.
    """

    name: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Fused:
    """A block that runs fused.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class of the block.
        norms (int): Number of fused normalisations.
        patterns (tuple[str]): Names of the patterns that it matches; empty if
            it only runs its children as one chain.
    """

    name: str
    source: str
    norms: int
    patterns: tuple = ()


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A module of another package that has the class of an adapter.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class before.
        target (str): Class now.
        layers (tuple[str]): Names of the layers that it got.
    """

    name: str
    source: str
    target: str
    layers: tuple


@dataclasses.dataclass(frozen=True)
class Unfused:
    """A block that runs layer by layer.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class of the block.
        reason (str): Reason for not fusing it.
    """

    name: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Scoped:
    """A module whose calls of torch's functions are compressed.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class of the module.
    """

    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Segment:
    """A block that runs again in the backward pass, from codes of its input.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class of the block.
        bits (int): Bits an element of its input.
    """

    name: str
    source: str
    bits: int


@dataclasses.dataclass(frozen=True)
class Unsegmented:
    """A repeated block that does not run again.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class of the block.
        reason (str): Reason for that.
    """

    name: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion.

    Attributes:
        level (str): Name of the level.
        converted (tuple[Converted]): Layers that are compressed.
        left (tuple[Left]): Layers that are not, with the reason.
        fused (tuple[Fused]): Blocks that run fused.
        adapted (tuple[Adapted]): Modules that have an adapter's class.
        unfused (tuple[Unfused]): Blocks with normalisations that run layer by
            layer, with the reason.
        scoped (tuple[Scoped]): Modules whose calls of functions, if there are
            any, are compressed.
        segments (tuple[Segment]): Blocks that run again.
        unsegmented (tuple[Unsegmented]): Repeated blocks that do not, with
            the reason, where the level recomputes.
        channels_last (int): Convolutions that were laid out as channels_last.
    """

    level: str
    converted: tuple
    left: tuple
    fused: tuple = ()
    adapted: tuple = ()
    unfused: tuple = ()
    scoped: tuple = ()
    segments: tuple = ()
    unsegmented: tuple = ()
    channels_last: int = 0

    def __str__(self):
        lines = [
            f'ActNN level {self.level}: {len(self.converted)} layers '
            f'compressed, {len(self.left)} left'
        ]
        kinds = collections.Counter(
            (item.source, item.target, _describe(item))
            for item in self.converted
        )
        for (source, target, size), count in sorted(kinds.items()):
            lines.append(f'  {count:4d} {source} -> {target} ({size})')
        models = collections.Counter(
            (item.source, item.target, item.layers) for item in self.adapted
        )
        for (source, target, layers), count in sorted(models.items()):
            effect = 'layers run together'
            if layers:
                effect = f'layers in place of functions: {", ".join(layers)}'
            lines.append(f'  {count:4d} {source} -> {target} ({effect})')
        blocks = collections.Counter(
            (item.source, _effect(item)) for item in self.fused
        )
        for (source, effect), count in sorted(blocks.items()):
            lines.append(f'  {count:4d} {source} fused: {effect}')
        if self.scoped:
            names = list(dict.fromkeys(item.source for item in self.scoped))
            shown = ', '.join(names[:3]) + (', ...' if names[3:] else '')
            lines.append(
                f'  {len(self.scoped):4d} modules: functions that they call '
                f'are compressed ({shown})'
            )
        repeated = collections.Counter(
            (item.source, item.bits) for item in self.segments
        )
        for (source, bits), count in sorted(repeated.items()):
            lines.append(
                f'  {count:4d} {source} recomputed from codes of {bits} bit'
            )
        if self.channels_last:
            lines.append(
                f'  {self.channels_last:4d} convolutions laid out as '
                'channels_last, and their outputs'
            )
        lines += _by_reason(self.unfused, 'not fused')
        scoped = {item.name for item in self.scoped}
        calling = [item for item in self.left if item.name in scoped]
        others = [item for item in self.left if item.name not in scoped]
        lines += [
            f'{line}, but for functions that they call'
            for line in _by_reason(calling, 'left')
        ]
        lines += _by_reason(others, 'left')
        lines += _by_reason(self.unsegmented, 'not recomputed')
        return '\n'.join(lines)


def _effect(fused):
    known = {
        'conv_norm_act': 'normalisation and ReLU share a payload',
        'norm_smooth': 'normalisation and activation share a payload',
    }
    own = [name for name in fused.patterns if name not in known]
    effects = []
    if fused.norms:
        effects += [known[name] for name in fused.patterns if name in known]
    elif not own:
        effects.append('convolutions of small maps run as one')
    if own:
        effects.append(f'places of {", ".join(own)}')
    return '; '.join(effects)


def _by_reason(items, state):
    reasons = collections.defaultdict(list)
    for item in items:
        reasons[item.source, item.reason].append(item.name)
    for (source, reason), names in sorted(reasons.items()):
        shown = ', '.join(names[:3]) + (', ...' if names[3:] else '')
        yield f'  {len(names):4d} {source} {state}: {reason} ({shown})'


def _describe(item):
    if item.bits is None:
        return 'exact'
    mean = ' on average' if item.adaptive else ''
    return f'{item.bits:g} bit{mean}'
