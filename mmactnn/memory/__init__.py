"""Measurement of the memory that a model keeps for its backward pass."""

from .breakdown import Breakdown, Category, Entry
from .location import Locator, Place, Source
from .meter import ActivationMeter, measure_activations

__all__ = [
    'ActivationMeter',
    'Breakdown',
    'Category',
    'Entry',
    'Locator',
    'Place',
    'Source',
    'measure_activations',
]
