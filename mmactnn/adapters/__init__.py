"""Parts of OpenMMLab's models whose functional calls are layers.

A module with the classes of another package is imported once a model or a
config asks for one of them.
"""

from .base import LayeredModule
from .find import MODEL_NAMES, LayeredPlan, find_layered

__all__ = ['LayeredModule', 'LayeredPlan', 'MODEL_NAMES', 'find_layered']
