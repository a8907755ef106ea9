"""Parts of other packages' models that no trace can show.

A module with the classes of another package is imported once a model has one
of them, see :meth:`mmactnn.registry.Registry.add_provider`.
"""

from .base import Adapter
from .find import AdapterPlan, find_adapters

__all__ = ['Adapter', 'AdapterPlan', 'find_adapters']
