"""Adapters for modules of other packages that cannot be traced.

The module for a package is imported once a model has a class of that
package, see :meth:`mmactnn.registry.Registry.add_provider`.
"""

from .base import Adapter
from .find import AdapterPlan, find_adapters

__all__ = ['Adapter', 'AdapterPlan', 'find_adapters']
