"""Blocks whose convolutions, normalisations, additions and ReLUs run as one.

A model is searched for modules that compute as some known class does. Each
gets an object in place of its ``forward`` that calls the same submodules, or
does what they do: parameters, ``state_dict`` keys and hooks of the model stay
what they are. Anything that is not known runs layer by layer.
"""

from ..layers import QReLU
from ..modules.naming import named_modules
from .base import Fusion
from .known import is_fused, make_fusion
from .members import NORMS

__all__ = ['Fusion', 'find_fusions', 'is_fused', 'remove_fusions']


def find_fusions(model, targets, added):
    """What of a model can be fused.

    Args:
        model (nn.Module): The model, converted or about to be.
        targets (dict[nn.Module, type]): The compressed classes of its layers
            that are compressed or about to be.
        added (dict[nn.Module, dict[str, nn.Module]]): Layers that modules are
            about to get, by their names in them.

    Returns:
        dict[str, Fusion]: By the qualified name of a module, what is to
        compute its forward pass; not installed.
    """

    def is_norm(module):
        return targets.get(module) in NORMS

    def is_relu(module):
        return targets.get(module) is QReLU

    found = {}
    for name, module in named_modules(model):
        fusion = make_fusion(module)
        if fusion is not None:
            fusion.adopt(added.get(module, {}))
            fusion = fusion.keep(is_norm, is_relu)
        if fusion is not None:
            found[name] = fusion
    return found


def remove_fusions(model):
    """Let all modules of a model compute by themselves again.

    Args:
        model (nn.Module): The model.
    """
    for module in model.modules():
        if is_fused(module):
            del module.forward
