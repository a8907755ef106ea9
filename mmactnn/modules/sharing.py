"""Layers that objects outside of a model hold as well."""

import collections
import gc
import sys

from torch import nn


def shared_layers(model):
    """Find layers of a model that other objects refer to.

    Such objects are other models with the same layer, classes with the layer
    as an attribute (``default_act = nn.SiLU()``), and globals and default
    arguments of the code that defines a class of the model: that code may add
    the layer to other models at any time.

    Args:
        model (nn.Module): The model.

    Returns:
        set[nn.Module]: Shared layers without parameters, buffers and
        children. (Sharing a layer with parameters trains it in both models.)
    """
    parts = list(model.modules())
    layers = {
        part
        for part in parts
        if not (part._parameters or part._buffers or part._modules)
    }
    found = {
        value
        for value in _reachable_by_code({type(part) for part in parts})
        if isinstance(value, nn.Module) and value in layers
    }
    tables = {id(part._modules) for part in parts}
    counts = collections.Counter(
        id(child) for part in parts for child in part._modules.values()
    )
    del parts
    # Finding referrers takes long. It is only done for layers with more of
    # them than the model and, in here, the set, the variable and the argument.
    suspects = [
        layer
        for layer in layers - found
        if sys.getrefcount(layer) > counts[id(layer)] + 4
    ]
    if suspects:
        ids = set(map(id, suspects))
        for holder in gc.get_referrers(*suspects):
            if type(holder) is dict and id(holder) not in tables:
                held = [v for v in holder.values() if id(v) in ids]
                if held and _is_part_of_module(holder):
                    found.update(held)
    return found


def alias_of(layer):
    """Make a second module that shares all state of a layer, with its hooks.

    Args:
        layer (nn.Module): A layer without parameters, buffers and parts.

    Returns:
        nn.Module: Hooks that are added to or removed from either are added to
        or removed from both.
    """
    alias = layer.__new__(type(layer))
    alias.__dict__.update(vars(layer))
    return alias


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
    """Whether a dict holds the children of a module."""
    if not all(v is None or isinstance(v, nn.Module) for v in table.values()):
        return False
    for holder in gc.get_referrers(table):
        if isinstance(holder, nn.Module) and holder._modules is table:
            return True
        if type(holder) is dict and holder.get('_modules') is table:
            return True
    return False
