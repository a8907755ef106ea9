"""CUDA graphs of parts of a model whose shapes repeat."""

from .install import remove_cuda_graphs, use_cuda_graphs
from .part import GraphedPart, GraphStats

__all__ = [
    'GraphStats',
    'GraphedPart',
    'remove_cuda_graphs',
    'use_cuda_graphs',
]
