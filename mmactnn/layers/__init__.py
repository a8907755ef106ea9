"""Compressed layers: subclasses of their torch parents, a file a family.

Every module of the package is imported, and all registered layers exported.
"""

import importlib
import pkgutil

from ..registry import default_registry
from .base import CodedLayer, ExactLayer, QuantizedLayer
from .smooth import SmoothLayer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

_registered = {
    layer.__name__: layer
    for layer in default_registry.layers
    if layer.__module__.startswith(f'{__name__}.')
}
globals().update(_registered)

__all__ = [
    'CodedLayer',
    'ExactLayer',
    'QuantizedLayer',
    'SmoothLayer',
    *_registered,
]
