"""Torch's functions in Python whose parts are compressed."""

from types import FunctionType

import torch
import torch.nn.functional as F

from ..modules.execution import ORDINARY
from ..modules.function_mode import FunctionMode
from ..registry import default_registry

# A function of torch's asks by this name whether a mode or a class of tensors
# takes its call.
_ASKS = 'has_torch_function'


def run_parts(scope, function, args, kwargs):
    """Run a function of torch, with handlers of the functions that it calls.

    Args:
        scope (FunctionScope): The running forward pass.
        function (Callable): The function, in Python.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.

    Returns:
        object: The result; NotImplemented for tensors of other classes, which
        take its call themselves.
    """
    if any(
        isinstance(value, torch.Tensor) and type(value) not in ORDINARY
        for value in (*args, *kwargs.values())
    ):
        return NotImplemented
    # The same code; it would give its call to the mode again.
    body = FunctionType(
        function.__code__,
        {**function.__globals__, _ASKS: lambda tensors: False},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    mode = FunctionMode(default_registry.functions.get)
    mode.scope = scope
    with mode:
        return body(*args, **kwargs)


if _ASKS in F.multi_head_attention_forward.__code__.co_names:
    default_registry.add_handler((F.multi_head_attention_forward,), run_parts)
