"""Adapters of one method, below the classes that extend it."""

from ..modules.functions import find_static, names_in
from .base import Adapter, derive


class InsertedAdapter(Adapter):
    """Mixin of adapters that replace one method wherever it is inherited.

    A subclass of the target may extend the method, and call the target's by
    ``super()``. An adapter of that subclass has the adapter's method right
    before the target's in its order of methods, so that this call reaches
    it::

        Extended -> QTarget -> Target

    Subclasses of this mixin define the method, which calls that of
    ``super()`` where it does not apply, and name it.

    Attributes:
        method (str): Name of the method.
    """

    method = None

    _functions = None

    @classmethod
    def _take_over(cls, parent):
        if cls.method in vars(cls):
            cls._functions = {cls.method: find_static(parent, cls.method)}

    @classmethod
    def is_complete(cls):
        """See the base class."""
        functions = cls._functions
        return functions is not None and None not in functions.values()

    @classmethod
    def serves(cls, plain):
        """See the base class.

        Args:
            plain (type): See there.

        Returns:
            bool: Whether calls of the method reach the function that this
            class replaces.
        """
        (replaced,) = cls._functions.values()
        for base in plain.__mro__:
            function = vars(base).get(cls.method)
            if function is replaced:
                return True
            code = getattr(function, '__code__', None)
            if function is not None and (
                code is None or 'super' not in names_in(code)
            ):
                return False
        return False

    @classmethod
    def derive(cls, plain):
        """See the base class."""
        return derive(cls, plain, inserted=True)
