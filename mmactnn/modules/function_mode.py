"""Mode in which functions of torch can have handlers."""

import sys
from types import FunctionType

import torch
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode, handle_torch_function

_C = torch._C


class FunctionMode(TorchFunctionMode):
    """Function mode that calls handlers in place of some functions.

    It changes no results, so that layers and blocks take no notice of it:
    :mod:`.execution` does not count it among the function modes.

    Args:
        find (Callable): Maps a function of torch to its handler, or to None.
            A handler is called with ``scope``, function, arguments and
            keyword arguments, outside of the mode, and returns the result of
            the call, or NotImplemented for the function to run.

    Attributes:
        scope (object): Argument of handlers; None while none are called.
    """

    def __init__(self, find):
        super().__init__()
        self._find = find
        self.scope = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """See ``torch.overrides``."""
        if is_dynamo_compiling():
            # A part of the model is compiled, and reads this function.
            return func(*args, **(kwargs or {}))
        handle = self._find(func)
        if handle is not None and self.scope is not None:
            result = handle(self.scope, func, args, kwargs or {})
            if result is not NotImplemented:
                return result
        if type(func) is FunctionType:
            func = _original(func, sys._getframe(1))
        return func(*args, **kwargs) if kwargs else func(*args)


def _original(func, frame):
    """The function that a mode was called for.

    Torch's functions in Python name themselves by a global variable. If that
    was patched, its value is a function around the one that runs.
    """
    if frame.f_code is not handle_torch_function.__code__:
        return func
    # Functions such as torch.unique are one of torch's own around several.
    if func.__globals__.get('__name__', '').startswith('torch.'):
        return func
    frame = frame.f_back
    code = frame.f_code
    if code is func.__code__ or code.co_freevars:
        return func
    return FunctionType(code, frame.f_globals)


def active_mode():
    """The innermost mode of functions, if it is the package's.

    Returns:
        FunctionMode, optional: None if there is no mode, or another one.
    """
    count = _C._len_torch_function_stack()
    if not count:
        return None
    mode = _C._get_function_stack_at(count - 1)
    return mode if type(mode) is FunctionMode else None


def call_outside(function, *args):
    """Call a function outside of the package's mode, if it is innermost.

    Every access to an attribute of a tensor takes a microsecond within.

    Args:
        function (Callable): The function.
        *args: Its arguments.

    Returns:
        object: Its result.
    """
    if active_mode() is None:
        return function(*args)
    mode = _C._pop_torch_function_stack()
    try:
        return function(*args)
    finally:
        _C._push_on_torch_function_stack(mode)
