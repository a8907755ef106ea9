"""Segments: parts of a forward pass that run again from coded inputs."""

from .checkpoint import checkpoint
from .find import find_segments
from .module import Segment, is_segment, revert_segments, set_segment

__all__ = [
    'Segment',
    'checkpoint',
    'find_segments',
    'is_segment',
    'revert_segments',
    'set_segment',
]
