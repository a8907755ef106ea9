"""Segments: parts of a forward pass that run again from codes."""

from .block import is_segment, make_segment, segments_replaced, undo_segments
from .checkpoint import DEFAULT_BITS, checkpoint
from .find import find_segments
from .random_states import RandomStates

__all__ = [
    'DEFAULT_BITS',
    'RandomStates',
    'checkpoint',
    'find_segments',
    'is_segment',
    'make_segment',
    'segments_replaced',
    'undo_segments',
]
