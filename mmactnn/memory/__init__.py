"""Counting of what a model keeps for the backward pass, and where."""

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
