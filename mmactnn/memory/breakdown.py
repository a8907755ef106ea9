"""Breakdown of kept memory by the parts of a model."""

import collections
import dataclasses
import enum

from ..codes.units import MIB
from ..fusion import is_fused
from ..layers import QuantizedLayer
from ..modules.naming import named_modules

# Number of causes in the one-line summary.
_MAX_CAUSES = 3


class Category(enum.Enum):
    """Kind of kept tensors."""

    COMPRESSED = 'compressed'
    """Codes and their ranges."""
    EXACT = 'exact by design'
    """Masks, positions and the like, which lose nothing."""
    LEFT = 'left'
    """Tensors as they are."""
    LOSS = 'loss'
    """Tensors that losses keep, see :class:`Locator`."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Memory that one place in a model keeps.

    Attributes:
        module (str): Qualified name of the module.
        type (str): Class of the module.
        source (str): Line of the call, as in ``rpn_head.py:104``; empty for
            layers.
        python_module (str): Dotted name of the Python module of that line.
        category (Category): Kind of kept tensors.
        exact_bytes (int): Bytes that torch would have kept.
        kept_bytes (int): Bytes that are kept.
        note (str): Reason for leaving the layer, or the text of the line.
    """

    module: str
    type: str
    source: str
    python_module: str
    category: Category
    exact_bytes: int
    kept_bytes: int
    note: str

    @property
    def cause(self):
        """str: The line, or the class of the layer."""
        return self.source or self.type


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Memory that the parts of a model keep in one forward pass.

    A storage counts once, for the part that kept it first, so that entries
    add up to the totals of :class:`mmactnn.ActivationMeter`.

    Attributes:
        entries (tuple[Entry]): Parts, the one that keeps most first.
    """

    entries: tuple

    @classmethod
    def of(cls, meter, model, report=None):
        """Break down the count of a meter.

        Args:
            meter (ActivationMeter): A meter with a :class:`Locator`.
            model (nn.Module): The model.
            report (ConversionReport, optional): Source of reasons for leaving
                layers.

        Returns:
            Breakdown: The parts.
        """
        reasons = {} if report is None else _reasons(report)
        modules = dict(named_modules(model))
        entries = [
            _entry(place, compressed, counted, modules, reasons)
            for (place, compressed), counted in meter.by_place().items()
            if any(counted)
        ]
        entries.sort(key=lambda e: (-e.kept_bytes, -e.exact_bytes, e.module))
        return cls(tuple(entries))

    @property
    def exact_bytes(self):
        """int: Bytes that torch would have kept, losses included."""
        return sum(e.exact_bytes for e in self.entries)

    @property
    def kept_bytes(self):
        """int: Bytes that are kept, losses included."""
        return sum(e.kept_bytes for e in self.entries)

    @property
    def ratio(self):
        """float: ``exact_bytes`` over ``kept_bytes``."""
        return self.exact_bytes / self.kept_bytes if self.kept_bytes else 1.0

    def kept_in(self, category):
        """Bytes that are kept of one category.

        Args:
            category (Category): The category.

        Returns:
            int: Bytes.
        """
        return sum(e.kept_bytes for e in self._of(category))

    @property
    def left_share(self):
        """float: Bytes left uncompressed over bytes that torch would keep.

        From 0 to 1; losses count in neither.
        """
        exact = self._exact_without_losses
        return self.kept_in(Category.LEFT) / exact if exact else 0.0

    @property
    def left_share_of_kept(self):
        """float: Bytes left uncompressed over bytes that are kept.

        From 0 to 1; losses count in neither.
        """
        kept = self.kept_bytes - self.kept_in(Category.LOSS)
        return self.kept_in(Category.LEFT) / kept if kept else 0.0

    def causes(self, category):
        """Causes of the entries of one category.

        Args:
            category (Category): The category.

        Returns:
            list[tuple[str, int]]: Lines of code or classes of layers, and the
            bytes that they keep, in descending order.
        """
        sizes = collections.Counter()
        for entry in self._of(category):
            sizes[entry.cause] += entry.kept_bytes
        return sizes.most_common()

    def __str__(self):
        """Summary of uncompressed memory, in one line."""
        left = self.kept_in(Category.LEFT)
        loss = self.kept_in(Category.LOSS)
        text = (
            f'left uncompressed: {left / MIB:.1f} of '
            f'{self._exact_without_losses / MIB:.1f} MiB '
            f'({self.left_share:.1%}), losses ({loss / MIB:.1f} MiB) apart'
        )
        causes = self.causes(Category.LEFT)
        named = [f'{c} {size / MIB:.1f}' for c, size in causes[:_MAX_CAUSES]]
        if causes[_MAX_CAUSES:]:
            named.append('...')
        return f'{text}: {", ".join(named)}' if named else text

    @property
    def _exact_without_losses(self):
        return sum(
            e.exact_bytes
            for e in self.entries
            if e.category is not Category.LOSS
        )

    def _of(self, category):
        return (e for e in self.entries if e.category is category)


def _entry(place, compressed, counted, modules, reasons):
    module = modules.get(place.module)
    category = _category(place, compressed, module)
    source = place.source
    return Entry(
        module='' if place.module is None else place.module,
        type='' if module is None else type(module).__name__,
        source='' if source is None else str(source),
        python_module='' if source is None else source.module,
        category=category,
        exact_bytes=counted.exact,
        kept_bytes=counted.saved,
        note=_note(place, category, module, reasons),
    )


def _category(place, compressed, module):
    if place.loss:
        return Category.LOSS
    if not compressed:
        return Category.LEFT
    exact = isinstance(module, QuantizedLayer) and not module.is_coded
    return Category.EXACT if exact else Category.COMPRESSED


def _note(place, category, module, reasons):
    if place.source is not None:
        return place.source.text
    if category is not Category.LEFT:
        return ''
    if isinstance(module, QuantizedLayer):
        exact = module.quantizer.exact
        return 'exact at this level' if exact else 'statistics'
    if is_fused(module):
        return 'statistics'
    return reasons.get(place.module, 'no compressed layer of this type')


def _reasons(report):
    return {item.name: item.reason for item in report.left}
