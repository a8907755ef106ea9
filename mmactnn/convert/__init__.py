"""Conversion of a model's layers into compressed ones, and back."""

from .api import convert_model, get_precision, revert_model
from .report import ConversionReport

__all__ = [
    'ConversionReport',
    'convert_model',
    'get_precision',
    'revert_model',
]
