"""How code runs now: plain eager torch, or under a tool that reads along."""

import functools
import logging

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.utils._device import DeviceContext

_ORDINARY = (torch.Tensor, torch.nn.Parameter)
_functorch = torch._C._functorch


def is_ordinary(tensor):
    """Whether a tensor holds values that kernels can read, and no more.

    Args:
        tensor (object): A tensor, or whatever is in its place.

    Returns:
        bool: False for subclasses, proxies of tracers, tensors without
        storage (meta, fake), and wrappers of functorch's transforms.
    """
    return (
        type(tensor) in _ORDINARY
        and not tensor.is_meta
        and not _functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_transformed():
    """Whether a transform follows computation besides reverse-mode autograd.

    Returns:
        bool: True under ``torch.func``, forward-mode differentiation and
        ``torch.jit.trace``.
    """
    return (
        _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_observed():
    """Whether anything watches all calls: global hooks, modes.

    Returns:
        bool: True under hooks that all modules have, dispatch modes, and
        function modes other than ``torch.device`` as a context.
    """
    return (
        module_hooks._has_any_global_hook()
        or torch._C._len_torch_dispatch_stack() > 0
        or _has_function_mode()
    )


def _has_function_mode():
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext
        for i in range(count)
    )


@functools.cache
def _tell_outside_graph():
    logging.getLogger('mmactnn').warning(
        'torch.compile: compressed layers run outside of the compiled graph'
    )


@torch.compiler.disable
def call_outside_graph(function, *args):
    """Call a function eagerly, where torch.compile reads along.

    The log says so once.

    Args:
        function (Callable): The function.
        *args: Its arguments.

    Returns:
        object: Its result.
    """
    _tell_outside_graph()
    return function(*args)
