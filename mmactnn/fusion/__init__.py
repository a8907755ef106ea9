"""Fusion of convolutions, normalisations, additions and ReLUs.

The forward pass of a block is traced when a model is converted, and patterns
over the trace find the sites that kernels and chains replace. The guards of a
trace are checked at every call: where one of them differs, or a hook needs the
tensors in between, the block's own forward pass runs.
"""

from .attention import SoftmaxAttention
from .block import fuse, is_fused, plain_class_of, unfuse
from .find import FoundFusions, Fusion, find_fusions, plan_again
from .patterns import Block
from .sites import ConvNormAct, Site

__all__ = [
    'Block',
    'ConvNormAct',
    'FoundFusions',
    'Fusion',
    'Site',
    'SoftmaxAttention',
    'find_fusions',
    'fuse',
    'is_fused',
    'plain_class_of',
    'plan_again',
    'remove_fusions',
]


def remove_fusions(model):
    """Unfuse all blocks of a model, in place.

    Args:
        model (nn.Module): The model.
    """
    for module in model.modules():
        if is_fused(module):
            unfuse(module)
