"""Conditions under which layers may run as part of something larger."""

import functools

import torch
from torch import nn

from ..layers import (
    QBatchNorm,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QReLU,
    QSyncBatchNorm,
)
from ..modules.execution import is_observed, is_transformed
from ..modules.functions import find_static, functions_of

NORMS = (QBatchNorm, QBatchNorm1d, QBatchNorm2d, QBatchNorm3d, QSyncBatchNorm)
CHAINED_CONVS = (QConv1d, QConv2d, QConv3d)
_TORCH_CONVS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_CONVS = (
    *CHAINED_CONVS,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    *_TORCH_CONVS,
)
# Functions that fused code stands for. A patch of one of them, made for all
# layers of a class, is seen by the layers themselves alone.
_REPLACED = tuple(
    (vars(owner), name, function)
    for cls in (
        *_TORCH_CONVS[:3],
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.ReLU,
    )
    for name, function in functions_of(cls).items()
    for owner in cls.__mro__
    if name in vars(owner) and vars(owner)[name] is function
) + tuple(
    (vars(nn.Module), name, vars(nn.Module)[name])
    for name in ('__call__', '_call_impl', '_wrapped_call_impl')
)


def are_functions_intact():
    """bool: Whether torch's layers compute as when this was imported."""
    for scope, name, function in _REPLACED:
        if scope.get(name) is not function:
            return False
    return True


def may_fuse():
    """Whether layers may run as part of something larger, now.

    Returns:
        bool: False where no gradient is recorded, something reads along, or
        a function of torch's layers was replaced.
    """
    return (
        torch.is_grad_enabled()
        and not is_transformed()
        and not is_observed()
        and are_functions_intact()
    )


@functools.lru_cache(maxsize=1024)
def kind_of(cls):
    """The compressed or plain layer class that a class computes as.

    Args:
        cls (type): Class of a layer.

    Returns:
        type, optional: The class itself or a base of it whose functions it
        leaves alone; None if fused code stands for neither.
    """
    for base in cls.__mro__:
        if base in NORMS or base in _CONVS or base is QReLU:
            same = all(
                find_static(cls, name) is function
                for name, function in functions_of(base).items()
            )
            return base if same else None
    return None


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


def is_watched(layer):
    """Whether hooks see a layer's tensors, or the instance was patched.

    Args:
        layer (nn.Module): The layer.
    """
    own = layer.__dict__
    return has_hooks(layer) or 'forward' in own or '_conv_forward' in own


def can_fuse_norm(norm):
    """Whether a normalisation can run with what follows it, now.

    Args:
        norm (nn.Module): What is in its place.
    """
    return kind_of(type(norm)) in NORMS and not is_watched(norm)


def can_skip_relu(relu):
    """Whether a ReLU need not be called where its output is known.

    Args:
        relu (nn.Module): What is in its place.
    """
    return kind_of(type(relu)) is QReLU and not is_watched(relu)


def is_convolution(layer):
    """Whether a layer computes as one of torch's convolutions.

    Args:
        layer (nn.Module): The layer.
    """
    own = layer.__dict__
    patched = 'forward' in own or '_conv_forward' in own
    return kind_of(type(layer)) in _CONVS and not patched


def is_output_private(conv):
    """Whether nobody but its reader sees what a convolution returns.

    Exact classes only: a subclass may keep its output, or return another.

    Args:
        conv (nn.Module): What is in its place.
    """
    return is_convolution(conv) and not has_hooks(conv)
