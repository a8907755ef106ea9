"""Whether somebody would notice that a layer did not run by itself."""

from torch import nn
from torch.nn.modules import module as module_hooks


def is_watched(layer):
    """Whether somebody sees what goes in or out of a layer, or replaced it.

    Args:
        layer (nn.Module): The layer.

    Returns:
        bool: Of hooks that all modules have it tells nothing.
    """
    return has_hooks(layer) or 'forward' in layer.__dict__


def has_hooks(layer):
    """Whether a layer has hooks of its own.

    Args:
        layer (nn.Module): The layer.
    """
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def are_all_watched():
    """bool: Whether there are hooks that all modules have."""
    return bool(
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
    )


def is_only_reader(conv):
    """Whether nobody but the next layer sees what a layer returns.

    Args:
        conv (nn.Module, optional): The layer, or None where another may.
    """
    return (
        isinstance(conv, nn.modules.conv._ConvNd)
        and not is_watched(conv)
        and not are_all_watched()
    )
