"""Choice of layers by name and class."""

import fnmatch

from ..layers import QuantizedLayer
from ..registry import default_registry


class Filter:
    """Patterns of names and classes; records which of them matched."""

    def __init__(self, argument, patterns):
        if isinstance(patterns, (str, type)):
            patterns = (patterns,)
        for pattern in patterns:
            if not isinstance(pattern, (str, type)):
                raise TypeError(
                    f'{argument} must hold glob patterns, names '
                    f'of classes or classes, got {pattern!r}'
                )
        self._argument = argument
        self._unused = dict.fromkeys(patterns)
        self._patterns = tuple(patterns)

    def matches(self, name, module):
        """Whether any pattern matches; records those that do."""
        # A compressed layer also matches the name of its original class, and
        # a subclass that computes as its parent that of the parent.
        classes = {type(module)}
        if isinstance(module, QuantizedLayer):
            classes.add(module.plain_class)
        entry, _ = default_registry.find_layer(module)
        if entry is not None:
            classes.add(entry.parent)
        return self._find(name, classes)

    def matches_class(self, name, cls):
        """As :meth:`matches`, of a layer by its class."""
        return self._find(name, {cls})

    def _find(self, name, classes):
        hits = [p for p in self._patterns if _match(p, name, classes)]
        for pattern in hits:
            self._unused.pop(pattern, None)
        return bool(hits)

    def require_all_used(self):
        """Raise if a pattern matched nothing, most likely a typing error."""
        if self._unused:
            patterns = ', '.join(repr(pattern) for pattern in self._unused)
            raise ValueError(
                f'{self._argument} matches no layer that can be '
                f'compressed: {patterns}'
            )


def _match(pattern, name, classes):
    if isinstance(pattern, type):
        return pattern in classes
    return fnmatch.fnmatchcase(name, pattern) or pattern in {
        cls.__name__ for cls in classes
    }
