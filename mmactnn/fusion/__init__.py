"""Blocks whose convolutions, normalisations, additions and ReLUs run as one.

A model is searched for modules that compute as some known class does. Each
gets an object in place of its ``forward`` that calls the same submodules, or
does what they do: parameters, ``state_dict`` keys and hooks of the model stay
what they are. Anything that is not known runs layer by layer.
"""

from ..layers import QReLU
from ..wrapping import named_modules
from .blocks import FusedPairs
from .known import MAKERS
from .members import NORMS

__all__ = ['FusedPairs', 'find_fusions', 'is_fused', 'remove_fusions']


def find_fusions(model, targets):
    """What of a model can be fused.

    Args:
        model (nn.Module): The model, converted or about to be.
        targets (dict[nn.Module, type]): The compressed classes of its layers
            that are compressed or about to be.

    Returns:
        dict[str, FusedPairs]: By the qualified name of a module, what is to
        compute its forward pass; not installed.
    """

    def is_norm(module):
        return targets.get(module) in NORMS

    def is_relu(module):
        return targets.get(module) is QReLU

    found = {}
    for name, module in named_modules(model):
        make = MAKERS.get(_forward_of(module))
        fusion = None if make is None else make(module)
        fusion = fusion and fusion.keep(is_norm, is_relu)
        if fusion is not None:
            found[name] = fusion
    return found


def is_fused(module):
    """Whether the forward pass of a module is computed in its place.

    Args:
        module (nn.Module): The module.
    """
    return isinstance(vars(module).get('forward'), FusedPairs)


def remove_fusions(model):
    """Let all modules of a model compute by themselves again.

    Args:
        model (nn.Module): The model.
    """
    for module in model.modules():
        if is_fused(module):
            del module.forward


def _forward_of(module):
    """Full name of the class that a module has its forward pass from.

    None if somebody else has put something in its place, as MMEngine does
    for activation checkpointing.
    """
    if 'forward' in vars(module) and not is_fused(module):
        return None
    for cls in type(module).__mro__:
        if 'forward' in vars(cls):
            return f'{cls.__module__}.{cls.__qualname__}'
    return None
