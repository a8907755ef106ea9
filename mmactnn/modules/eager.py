"""Where torch.compile would compile code that has to run eagerly."""

import functools

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback


def meets_compiler():
    """Whether this code, or what it calls, would be compiled.

    Unlike ``torch.compiler.is_compiling()`` it is also true in a frame that
    the compiler has given up while it waits for the frames that this one
    calls. It takes a tenth of a microsecond.

    Returns:
        bool: Whether it would be.
    """
    return (
        torch.compiler.is_compiling() or get_eval_frame_callback() is not None
    )


def never_compiled(function):
    """Decorate a function that autograd calls: it always runs eagerly.

    On the CPU autograd runs backward passes in the thread that asks for them.
    If that thread is within a compiled function, such as a whole training
    step, the compiler takes whatever Python code autograd calls, and code
    that has seeds and offsets from the host once for each of these.

    Args:
        function (Callable): The function, of positional arguments.

    Returns:
        Callable: The same function, for eager calls alone.
    """

    @functools.wraps(function)
    def wrapper(*args):
        if not meets_compiler():
            return function(*args)
        from .graph_break import call_outside_graph

        return call_outside_graph(function, *args)

    return wrapper
