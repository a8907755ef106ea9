"""Compressed forms of torch's functions, for modules that call them.

A forward pass in which no layer but code calls ``F.relu`` or ``x * y`` runs
in a scope: a function mode that is active in the forward passes of a
converted model's modules, in training. Functions with a handler
(:func:`mmactnn.register_function`) run compressed; all others are torch's.
Functions that move elements pass on the payloads of their arguments.

Every module of the package is imported.
"""

import importlib
import pkgutil

from .modules import (
    ScopedModule,
    calls_functions,
    remove_scopes,
    set_scope,
    settings_of,
    unscoped_class,
)
from .movement import move
from .scope import FunctionSettings, call_in_scope

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

__all__ = [
    'ScopedModule',
    'FunctionSettings',
    'call_in_scope',
    'calls_functions',
    'move',
    'remove_scopes',
    'set_scope',
    'settings_of',
    'unscoped_class',
]
