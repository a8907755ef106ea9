"""Report of a conversion."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Converted:
    """A layer that is compressed.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class it had before.
        target (str): Class it has now.
        bits (float, optional): Bits an element, 0 where nothing is kept; None
            for exact, which keeps what torch does.
        adaptive (bool): Whether they are a mean that is shared out.
    """

    name: str
    source: str
    target: str
    bits: float | None
    adaptive: bool


@dataclasses.dataclass(frozen=True)
class Left:
    """A layer that was left alone.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Its class.
        reason (str): Why.
    """

    name: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Fused:
    """A block whose normalisation, addition and ReLU run as one.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Its class.
        norms (int): How many normalisations it has that are fused.
    """

    name: str
    source: str
    norms: int


@dataclasses.dataclass(frozen=True)
class Layered:
    """A module that calls layers where it called functions.

    Attributes:
        name (str): Qualified name in the model.
        source (str): Class it had before.
        target (str): Class it has now.
        layers (tuple[str]): Names of the layers in the module.
    """

    name: str
    source: str
    target: str
    layers: tuple


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        level (str): Name of the level.
        converted (tuple[Converted]): Layers that are compressed now.
        left (tuple[Left]): Layers that are not, with the reason.
        fused (tuple[Fused]): Blocks that run fused.
        layered (tuple[Layered]): Modules that call layers now in place of
            functions.
    """

    level: str
    converted: tuple
    left: tuple
    fused: tuple = ()
    layered: tuple = ()

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
            (item.source, item.target, item.layers) for item in self.layered
        )
        for (source, target, layers), count in sorted(models.items()):
            lines.append(
                f'  {count:4d} {source} -> {target} (layers in place of '
                f'functions: {", ".join(layers)})'
            )
        blocks = collections.Counter(
            (item.source, item.norms > 0) for item in self.fused
        )
        for (source, has_norms), count in sorted(blocks.items()):
            effect = (
                'normalisation and ReLU share a payload'
                if has_norms
                else 'convolutions of small maps run as one'
            )
            lines.append(f'  {count:4d} {source} fused: {effect}')
        reasons = collections.defaultdict(list)
        for item in self.left:
            reasons[item.source, item.reason].append(item.name)
        for (source, reason), names in sorted(reasons.items()):
            shown = ', '.join(names[:3]) + (', ...' if names[3:] else '')
            lines.append(
                f'  {len(names):4d} {source} left: {reason} ({shown})'
            )
        return '\n'.join(lines)


def _describe(item):
    if item.bits is None:
        return 'exact'
    mean = ' on average' if item.adaptive else ''
    return f'{item.bits:g} bit{mean}'
