"""Functions that move elements: results have the payloads of arguments."""

import torch
import torch.nn.functional as F

from ..codes.exact import ChosenTensor
from ..codes.moved import MovedTensor, Movement
from ..modules.execution import ORDINARY
from ..registry import default_registry


def move(scope, function, args, kwargs):
    """Handle a call of a function that moves the elements of its argument.

    Results get the payload of the argument, if it has one, with the movement.
    So do functions that choose or repeat elements, put zeros beside them, or
    change their dtype: whatever is linear in the argument, and a function of
    it alone. A table of biases, which is a parameter, needs no payload for
    what an index chooses from it.

    Args:
        scope (FunctionScope): The running scope.
        function (Callable): The function.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.

    Returns:
        object: Its result.
    """
    result = function(*args, **kwargs)
    if not args:
        return result
    source, cache = args[0], scope.settings.cache
    # Most tensors have no payload: nothing else is asked of them.
    payload = cache.get(source)
    if payload is None and _chooses(function, args, result):
        cache.put(result, ChosenTensor.of(result, *args))
        return result
    if (
        payload is None
        or type(source) not in ORDINARY
        or any(map(_has_tensors, args[1:]))
        or any(map(_has_tensors, kwargs.values()))
    ):
        return result
    several = isinstance(result, (tuple, list))
    for i, tensor in enumerate(result if several else (result,)):
        if (
            tensor is not source
            and type(tensor) in ORDINARY
            and tensor.dim()
            and tensor.device == source.device
            and tensor.is_floating_point()
        ):
            movement = Movement(
                function, args[1:], kwargs, i if several else None
            )
            cache.put(tensor, MovedTensor.of(payload, tensor, movement))
    return result


def _chooses(function, args, result):
    """Whether an index chooses more elements from a leaf than it has."""
    return (
        function is torch.Tensor.__getitem__
        and type(args[0]) in ORDINARY
        and args[0].is_leaf
        and type(args[1]) in ORDINARY
        and args[1].dim() > 0
        and result.requires_grad
        and result.numel() > args[0].numel()
    )


def _has_tensors(value):
    if isinstance(value, (tuple, list)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


def _variants(*names):
    """Functions of torch and methods of tensors of the same names."""
    for name in names:
        for owner in (torch, torch.Tensor):
            function = getattr(owner, name, None)
            if function is not None:
                yield function


MOVEMENTS = dict.fromkeys(
    [
        *_variants(
            'chunk',
            'clone',
            'flatten',
            'flip',
            'movedim',
            'moveaxis',
            'narrow',
            'permute',
            'reshape',
            'roll',
            'rot90',
            'select',
            'split',
            'squeeze',
            'swapaxes',
            'swapdims',
            't',
            'tensor_split',
            'transpose',
            'unbind',
            'unflatten',
            'unsqueeze',
        ),
        torch.Tensor.__getitem__,
        torch.Tensor.bfloat16,
        torch.Tensor.contiguous,
        torch.Tensor.expand,
        torch.Tensor.float,
        torch.Tensor.half,
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.unfold,
        torch.Tensor.view,
        # Attributes.
        torch.Tensor.T.__get__,
        torch.Tensor.mT.__get__,
        F.pad,
        F.pixel_shuffle,
        F.pixel_unshuffle,
        F.unfold,
    ]
)

default_registry.add_handler(tuple(MOVEMENTS), move)
