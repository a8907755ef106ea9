"""Conditions under which layers may run fused."""

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
from ..modules.functions import functions_of, has_functions

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
# Functions in place of which fused code runs, as (scope, name, function). It
# would ignore a patch of one of them.
_REPLACED_FUNCTIONS = tuple(
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
    """Whether the functions of torch's layers are those at import.

    Returns:
        bool: False if one of them was patched.
    """
    for scope, name, function in _REPLACED_FUNCTIONS:
        if scope.get(name) is not function:
            return False
    return True


def may_fuse():
    """Whether layers may run fused now.

    Returns:
        bool: False where no gradient is recorded, under transforms and
        observers, and if a function of torch's layers was patched.
    """
    return (
        torch.is_grad_enabled()
        and not is_transformed()
        and not is_observed()
        and are_functions_intact()
    )


@functools.lru_cache(maxsize=1024)
def base_layer_class(cls):
    """The compressed or plain layer class whose functions a class has.

    Args:
        cls (type): Class of a layer.

    Returns:
        type, optional: The class itself or a base of it, none of whose
        functions it overrides; None if fused code supports neither.
    """
    for base in cls.__mro__:
        if base in NORMS or base in _CONVS or base is QReLU:
            return base if has_functions(cls, functions_of(base)) else None
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


def is_instrumented(layer):
    """Whether a layer has hooks or a patched forward pass.

    Args:
        layer (nn.Module): The layer.
    """
    own = layer.__dict__
    return has_hooks(layer) or 'forward' in own or '_conv_forward' in own


def can_fuse_norm(norm):
    """Whether a normalisation can run fused now.

    Args:
        norm (nn.Module): The module in the place of the normalisation.
    """
    return base_layer_class(type(norm)) in NORMS and not is_instrumented(norm)


def can_skip_relu(relu):
    """Whether fused code can run in place of a ReLU.

    Args:
        relu (nn.Module): The module in the place of the ReLU.
    """
    return base_layer_class(type(relu)) is QReLU and not is_instrumented(relu)


def is_convolution(layer):
    """Whether a layer computes as one of torch's convolutions.

    Args:
        layer (nn.Module): The layer.
    """
    own = layer.__dict__
    patched = 'forward' in own or '_conv_forward' in own
    return base_layer_class(type(layer)) in _CONVS and not patched


def is_output_private(conv):
    """Whether the output of a convolution may be overwritten.

    Args:
        conv (nn.Module): The module in the place of the convolution.
    """
    return is_convolution(conv) and not has_hooks(conv)
