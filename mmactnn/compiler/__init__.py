"""Compiled graphs that keep few-bit codes: a partitioner."""

from .classes import register_linear_use
from .options import compile, compile_options, compile_report

__all__ = [
    'compile',
    'compile_options',
    'compile_report',
    'register_linear_use',
]
