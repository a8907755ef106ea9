"""Segments: parts of a forward pass that run again from codes."""

from .block import is_segment, make_segment, segments_replaced, undo_segments
from .checkpoint import DEFAULT_BITS, checkpoint
from .find import FoundSegments, find_segments
from .parts import BlockParts
from .random_states import RandomStates

__all__ = [
    'DEFAULT_BITS',
    'BlockParts',
    'FoundSegments',
    'RandomStates',
    'checkpoint',
    'find_segments',
    'is_segment',
    'make_segment',
    'segments_replaced',
    'undo_segments',
]
