"""What a trace rests on, compared when its plan runs."""

from operator import is_
from types import ModuleType
from typing import NamedTuple

from torch import nn

from ..modules.functions import functions_of, names_in

_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_STRUCTURE = ('_parameters', '_buffers', '_modules')
# Deeper or longer containers are compared by identity alone.
_MAX_ITEMS, _MAX_DEPTH = 64, 3


class Own(NamedTuple):
    """Attributes of a module that a trace read by value.

    Attributes:
        path (tuple[str]): Names that lead to the module.
        values (tuple): Pairs of a name in the module's ``__dict__`` and its
            frozen value.
        absent (tuple[str]): Names that are not in its ``__dict__``, so that
            the class's attribute counts.
        cls (tuple): Pairs of a name and the attribute that the class has.
        tables (tuple): Pairs of ``'_modules'``, ``'_parameters'`` or
            ``'_buffers'`` and its structure: names, and which are None.
    """

    path: tuple
    values: tuple
    absent: tuple
    cls: tuple
    tables: tuple


class Guards(NamedTuple):
    """Everything that a trace read by value, or calls by name.

    Attributes:
        shared (tuple): Triples of a dict of globals, a name and its value.
        cells (tuple): Pairs of a closure's cell and its value.
        own (tuple[Own]): Of the module and of its parts.
    """

    shared: tuple
    cells: tuple
    own: tuple

    def hold(self, module, cls, seen=None):
        """Whether all is as it was when the trace was made.

        Args:
            module (nn.Module): The module, or a copy of it.
            cls (type): Class whose forward pass was traced.
            seen (dict, optional): Parts that the module had when the guards
                held last; updated.

        Returns:
            bool: False if anything differs.
        """
        # Asked at every call of a block: loops, and no calls within them
        # but where something differs.
        for scope, name, value in self.shared:
            if scope.get(name, _MISSING) is not value:
                return False
        for cell, value in self.cells:
            if cell.cell_contents is not value and not _equals(
                cell.cell_contents, value
            ):
                return False
        for part in self.own:
            owner = module
            for name in part.path:
                owner = owner._modules.get(name)
                if owner is None:
                    return False
            own = owner.__dict__
            for name, value in part.values:
                found = own.get(name, _MISSING)
                if found is not value and not _equals(found, value):
                    return False
            for name in part.absent:
                if name in own:
                    return False
            for name, value in part.cls:
                if getattr(cls, name, _MISSING) is not value:
                    return False
            for table, structure in part.tables:
                items = None
                if seen is not None and table == '_modules':
                    items = list(own[table].items())
                    if items == seen.get(part.path):
                        continue
                if _structure(own[table]) != structure:
                    return False
                if items is not None:
                    seen[part.path] = items
        return True


def _structure(table):
    """Names of a table, which are None, and which hold the same object."""
    first, structure = {}, []
    for name, value in table.items():
        structure.append(name)
        structure.append(
            value is not None and first.setdefault(id(value), name)
        )
    return structure


class _Frozen(NamedTuple):
    """A container, by its items."""

    kind: type
    items: tuple


def freeze(value, depth=0):
    """A value as it is now, to compare with later ones.

    Args:
        value (object): Plain values and containers of them are copied;
            anything else stands for itself.
        depth (int, optional): Containers around it. Defaults to none.

    Returns:
        object: See :func:`_equals`.
    """
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        if len(value) <= _MAX_ITEMS and depth < _MAX_DEPTH:
            items = value.items() if isinstance(value, dict) else value
            frozen = tuple(freeze(item, depth + 1) for item in items)
            # One that cannot change, nor anything in it, is found again by
            # its identity.
            if type(value) is tuple and all(map(is_, value, frozen)):
                return value
            return _Frozen(type(value), frozen)
    return value


def _equals(value, frozen):
    if value is frozen:
        return True
    if isinstance(frozen, _Frozen):
        if type(value) is not frozen.kind or len(value) != len(frozen.items):
            return False
        items = value.items() if isinstance(value, dict) else value
        return all(map(_equals, items, frozen.items))
    if isinstance(frozen, _PLAIN):
        return type(value) is type(frozen) and value == frozen
    return (
        type(value) is type(frozen) is tuple
        and len(value) == len(frozen)
        and all(map(_equals, value, frozen))
    )


def make_guards(module, cls, calls, parts):
    """Guards of a trace.

    Names that a function's code has, and could have read, count as read.

    Args:
        module (nn.Module): The module that was traced.
        cls (type): Class whose forward pass was traced.
        calls (Sequence[tuple[CodeType, dict]]): Code and globals of the
            functions that ran.
        parts (Sequence[tuple[str]]): Paths of the parts of the module that
            the trace went through or to.

    Returns:
        Guards: The guards.
    """
    shared, names = {}, set()
    for code, scope in calls:
        read = names_in(code)
        names |= read
        for name in read & scope.keys():
            _guard_global(shared, scope, name, read)
    functions = functions_of(cls)
    cells = []
    for value in functions.values():
        function = getattr(value, 'fget', None) or value
        function = getattr(function, '__func__', function)
        for cell in function.__closure__ or ():
            cells.append((cell, freeze(cell.cell_contents)))
            _guard_cell(shared, cell.cell_contents, names)
    own = [_own(module, (), names, cls)]
    for path in parts:
        part = module
        for name in path:
            part = part._modules[name]
        guard = _own(part, path, names, None)
        if guard != Own(path, (), (), (), ()):
            own.append(guard)
    return Guards(tuple(shared.values()), tuple(cells), tuple(own))


def _guard_global(shared, scope, name, read):
    value = scope[name]
    shared[id(scope), name] = scope, name, value
    if isinstance(value, ModuleType):
        inner = vars(value)
        for attribute in read & inner.keys():
            key = id(inner), attribute
            shared[key] = inner, attribute, inner[attribute]


def _guard_cell(shared, value, names):
    if isinstance(value, ModuleType):
        for name in names & vars(value).keys():
            shared[id(vars(value)), name] = (
                vars(value),
                name,
                vars(value)[name],
            )


def _own(owner, path, names, cls):
    own = owner.__dict__
    values = tuple(
        (name, freeze(own[name]))
        for name in sorted(names & own.keys())
        if name not in _STRUCTURE and name != 'training'
    )
    attributes = ()
    if cls is not None:
        attributes = tuple(
            (name, getattr(cls, name))
            for name in sorted(names | {'forward'})
            if name not in own
            and hasattr(cls, name)
            and (name == 'forward' or not hasattr(nn.Module, name))
        )
    tables = [('_modules', _structure(owner._modules))]
    if not owner._modules:
        tables.clear()
    tables += [
        (table, _structure(own[table]))
        for table in ('_parameters', '_buffers')
        if names & own[table].keys()
    ]
    absent = tuple(name for name, _ in attributes)
    return Own(path, values, absent, attributes, tuple(tables))
