"""Blocks whose convolutions, normalisations, additions and ReLUs run as one.

The forward pass of a block is traced when a model is converted; patterns over
the trace find the places that kernels and chains stand for. What a trace rests
on is compared whenever the block runs: where anything differs, and where
somebody sees the tensors in between, the block's own forward pass runs.
"""

from .block import fuse, is_fused, plain_class_of, unfuse
from .find import Found, Fusion, find_fusions, plan_again
from .patterns import Block
from .sites import ConvNormAct, Site

__all__ = [
    'Block',
    'ConvNormAct',
    'Found',
    'Fusion',
    'Site',
    'find_fusions',
    'fuse',
    'is_fused',
    'plain_class_of',
    'plan_again',
    'remove_fusions',
]


def remove_fusions(model):
    """Let all modules of a model compute by themselves again.

    Args:
        model (nn.Module): The model.
    """
    for module in model.modules():
        if is_fused(module):
            unfuse(module)
