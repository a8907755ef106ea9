"""Which part of a model keeps what for the backward pass."""

from .breakdown import Breakdown, Category, Entry
from .location import Locator, Place, Source

__all__ = ['Breakdown', 'Category', 'Entry', 'Locator', 'Place', 'Source']
