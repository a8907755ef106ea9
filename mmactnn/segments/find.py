"""Search for the repeated blocks of a model."""

import collections

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules.functions import find_static
from ..modules.naming import named_modules

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Layers whose weights multiply activations: a block has several.
_MIN_WEIGHTS = 2


def find_segments(model):
    """Find the repeated blocks of a model.

    A block is a module in a list or a sequence, of a class of which the model
    has several in such places, with a normalisation and at least two layers
    with weights. Of blocks within blocks, the innermost are found, since the
    memory for one that runs again grows with its size.

    Blocks with batch normalisation are none: their layers keep codes that
    batch normalisation, ReLU and convolution share, which takes as little
    memory without running anything again.

    Args:
        model (nn.Module): The model, not converted.

    Returns:
        dict[str, nn.Module]: Blocks by qualified name.
    """
    candidates = {}
    for name, module in named_modules(model):
        if not isinstance(module, _CONTAINERS):
            continue
        for key, child in module.named_children():
            if _is_block(child):
                candidates[f'{name}.{key}' if name else key] = child
    counts = collections.Counter(map(_forward_of, candidates.values()))
    blocks = {
        name: module
        for name, module in candidates.items()
        if counts[_forward_of(module)] > 1
    }
    return {
        name: module
        for name, module in blocks.items()
        if not any(other.startswith(f'{name}.') for other in blocks)
    }


def _forward_of(module):
    return find_static(type(module), 'forward')


def _is_block(module):
    if isinstance(module, _CONTAINERS) or 'forward' in module.__dict__:
        return False
    weights = norms = 0
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            return False
        parameters = list(part.parameters(recurse=False))
        weights += any(p.dim() > 1 for p in parameters)
        norms += bool(parameters) and all(p.dim() == 1 for p in parameters)
    return weights >= _MIN_WEIGHTS and norms > 0
