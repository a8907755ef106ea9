"""Modules that somebody outside of a model holds as well."""

import gc
import sys

from torch import nn


def shared_layers(model, layers):
    """Layers of a model that others than the model can reach.

    These are another model that has the layer as a part, a class with the
    layer as attribute (``default_act = nn.SiLU()``), and globals and default
    arguments of the code that defines a class of the model: whatever uses the
    layer there may make it a part of other models at any time.

    Args:
        model (nn.Module): The model.
        layers (Iterable[nn.Module]): Layers of it.

    Returns:
        set[nn.Module]: Those that are shared.
    """
    layers = set(layers)
    if not layers:
        return set()
    parts = list(model.modules())
    tables = {id(part._modules) for part in parts}
    found = set()
    for value in _reachable_by_code({type(part) for part in parts}):
        if isinstance(value, nn.Module) and value in layers:
            found.add(value)
    counts = {}
    for part in parts:
        for child in part._modules.values():
            counts[child] = counts.get(child, 0) + 1
    # Looking for who holds an object takes long: only where more do than the
    # model, this function and its caller.
    suspects = [
        layer
        for layer in layers - found
        if sys.getrefcount(layer) > counts.get(layer, 0) + 4
    ]
    for layer in suspects:
        for holder in gc.get_referrers(layer):
            if (
                type(holder) is dict
                and id(holder) not in tables
                and _is_part_of_module(holder)
            ):
                found.add(layer)
                break
    return found


def _reachable_by_code(classes):
    for cls in classes:
        for base in cls.__mro__:
            if base.__module__.partition('.')[0] in ('builtins', 'torch'):
                continue
            yield from vars(base).values()
            init = vars(base).get('__init__')
            yield from getattr(init, '__defaults__', None) or ()
            yield from (getattr(init, '__kwdefaults__', None) or {}).values()
            scope = sys.modules.get(base.__module__)
            yield from list(vars(scope).values()) if scope else ()


def _is_part_of_module(table):
    """Whether a dict is the table of parts of some module."""
    for holder in gc.get_referrers(table):
        if isinstance(holder, nn.Module) and holder._modules is table:
            return True
        if type(holder) is dict and holder.get('_modules') is table:
            return True
    return False
