"""Guards of a trace: values that it read, compared before its plan runs."""

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


class ModuleGuards(NamedTuple):
    """Attributes of a module that a trace read by value.

    Attributes:
        path (tuple[str]): Names that lead to the module.
        values (tuple): Pairs of a name in the module's ``__dict__`` and its
            frozen value.
        absent (tuple[str]): Names that must not be in its ``__dict__``, where
            they would hide the class's attribute.
        class_attributes (tuple): Pairs of a name and the class's attribute.
        tables (tuple): Pairs of ``'_modules'``, ``'_parameters'`` or
            ``'_buffers'`` and its structure, see :func:`_structure`.
    """

    path: tuple
    values: tuple
    absent: tuple
    class_attributes: tuple
    tables: tuple


class Guards(NamedTuple):
    """All values that a trace read, and functions that it called by name.

    Attributes:
        global_values (tuple): Triples of a dict of globals, a name and its
            value.
        cells (tuple): Pairs of a closure's cell and its frozen value.
        modules (tuple[ModuleGuards]): Guards of the module and of its parts.
    """

    global_values: tuple
    cells: tuple
    modules: tuple

    def hold(self, module, cls, last_parts=None):
        """Whether all values equal those at the time of the trace.

        Args:
            module (nn.Module): The module, or a copy of it.
            cls (type): Class whose forward pass was traced.
            last_parts (dict, optional): Parts of the module when the guards
                held last, which need no second comparison; updated.

        Returns:
            bool: False if anything differs.
        """
        # This runs at every call of a block: plain loops, which call functions
        # only where something differs.
        for scope, name, value in self.global_values:
            if scope.get(name, _MISSING) is not value:
                return False
        for cell, value in self.cells:
            if cell.cell_contents is not value and not _equals(
                cell.cell_contents, value
            ):
                return False
        for part in self.modules:
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
            for name, value in part.class_attributes:
                if getattr(cls, name, _MISSING) is not value:
                    return False
            for table, structure in part.tables:
                items = None
                if last_parts is not None and table == '_modules':
                    items = list(own[table].items())
                    if items == last_parts.get(part.path):
                        continue
                if _structure(own[table]) != structure:
                    return False
                if items is not None:
                    last_parts[part.path] = items
        return True


def _structure(table):
    """Structure of a table, equal for copies of a module.

    Args:
        table (dict[str, object]): Modules, parameters or buffers by name.

    Returns:
        list: For each entry its name, then False for None, else the name of
        the first entry that holds the same object.
    """
    first, structure = {}, []
    for name, value in table.items():
        structure.append(name)
        structure.append(
            value is not None and first.setdefault(id(value), name)
        )
    return structure


class _Frozen(NamedTuple):
    """Frozen copy of a container."""

    kind: type
    items: tuple


def freeze(value, depth=0):
    """Copy of a value, for comparisons with later ones.

    Args:
        value (object): The value. Small containers are copied; other values
            cannot change, or are compared by identity.
        depth (int, optional): Number of containers around it. Defaults to 0.

    Returns:
        object: Second argument of :func:`_equals`.
    """
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        if len(value) <= _MAX_ITEMS and depth < _MAX_DEPTH:
            items = value.items() if isinstance(value, dict) else value
            frozen = tuple(freeze(item, depth + 1) for item in items)
            # An immutable tuple is found again by its identity.
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
    """Make the guards of a trace.

    All names in a function's code count as read.

    Args:
        module (nn.Module): The module that was traced.
        cls (type): Class whose forward pass was traced.
        calls (Sequence[tuple[CodeType, dict]]): Code and globals of the
            functions that ran.
        parts (Sequence[tuple[str]]): Paths of the parts that the trace calls,
            and of the modules on the way to them.

    Returns:
        Guards: The guards.
    """
    global_values, names = {}, set()
    for code, scope in calls:
        read = names_in(code)
        names |= read
        for name in read & scope.keys():
            _guard_global(global_values, scope, name, read)
    functions = functions_of(cls)
    cells = []
    for value in functions.values():
        function = getattr(value, 'fget', None) or value
        function = getattr(function, '__func__', function)
        for cell in function.__closure__ or ():
            cells.append((cell, freeze(cell.cell_contents)))
            _guard_cell(global_values, cell.cell_contents, names)
    modules = [_guard_module(module, (), names, cls)]
    for path in parts:
        part = module
        for name in path:
            part = part._modules[name]
        guard = _guard_module(part, path, names, None)
        if guard != ModuleGuards(path, (), (), (), ()):
            modules.append(guard)
    return Guards(tuple(global_values.values()), tuple(cells), tuple(modules))


def _guard_global(global_values, scope, name, read):
    value = scope[name]
    global_values[id(scope), name] = scope, name, value
    if isinstance(value, ModuleType):
        inner = vars(value)
        for attribute in read & inner.keys():
            key = id(inner), attribute
            global_values[key] = inner, attribute, inner[attribute]


def _guard_cell(global_values, value, names):
    if isinstance(value, ModuleType):
        for name in names & vars(value).keys():
            global_values[id(vars(value)), name] = (
                vars(value),
                name,
                vars(value)[name],
            )


def _guard_module(owner, path, names, cls):
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
    return ModuleGuards(path, values, absent, attributes, tuple(tables))
