"""The kernels as functions of tensors, without autograd.

The names that a module of this package lists in its ``__all__`` are names of
the package: an op is a module, and nothing else has to know of it.
"""

import importlib
import pkgutil

from . import layout

__all__ = ['layout']

for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f'.{_info.name}', __name__)
    for _name in getattr(_module, '__all__', ()):
        # In place of the module, where an op has its name.
        globals()[_name] = getattr(_module, _name)
        __all__ += [_name]
