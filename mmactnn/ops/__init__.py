"""The kernels as functions of tensors, without autograd.

The package exports all names that its modules list in ``__all__``: adding an
op means adding a module, and nothing else.
"""

import importlib
import pkgutil

from . import layout

__all__ = ['layout']

for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f'.{_info.name}', __name__)
    for _name in getattr(_module, '__all__', ()):
        # An op replaces the module of the same name.
        globals()[_name] = getattr(_module, _name)
        __all__ += [_name]
