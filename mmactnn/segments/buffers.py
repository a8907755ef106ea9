"""Buffers that a forward pass writes to, such as running statistics."""

import contextlib
import functools
from types import FunctionType, MethodType

from torch import nn


def reachable_modules(function, arguments=()):
    """Find the modules that a function may call.

    Args:
        function (Callable): A module, a bound method of one, a partial, or a
            function with modules in its closure and defaults.
        arguments (Iterable, optional): Its arguments.

    Returns:
        list[nn.Module]: The modules with all of their parts. Those that a
        function finds as globals are not known.
    """
    found, seen = {}, set()
    todo = [function, *arguments]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.update(dict.fromkeys(value.modules()))
        elif isinstance(value, MethodType):
            todo += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, FunctionType):
            todo += value.__defaults__ or ()
            todo += (value.__kwdefaults__ or {}).values()
            for cell in value.__closure__ or ():
                # An empty cell raises.
                with contextlib.suppress(ValueError):
                    todo.append(cell.cell_contents)
    return list(found)


class BufferWrites:
    """Modules whose buffers a forward pass writes to.

    A second forward pass of them gets copies of their buffers, so that each
    is updated once.

    Args:
        modules (Iterable[nn.Module]): Modules that the pass may call.
    """

    def __init__(self, modules):
        self._before = [
            (module, _state(module)) for module in modules if module._buffers
        ]
        self._written = ()

    def finish(self):
        """Find the modules that were written to since."""
        # Kernels that update running statistics count no versions of them,
        # but the module counts batches: all buffers of a module go together.
        self._written = tuple(
            module for module, state in self._before if _state(module) != state
        )
        self._before = ()

    def discarded(self):
        """Discard what is written to the buffers, as a context."""
        return buffers_copied(self._written)


@contextlib.contextmanager
def buffers_copied(modules):
    """Give modules copies of their buffers, as a context.

    Args:
        modules (Iterable[nn.Module]): The modules.

    Yields:
        list[Tensor[*]]: The copies.
    """
    originals = [(module, dict(module._buffers)) for module in modules]
    copies = []
    for module, buffers in originals:
        for name, buffer in buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.detach().clone()
                copies.append(module._buffers[name])
    try:
        yield copies
    finally:
        for module, buffers in originals:
            module._buffers.update(buffers)


def _state(module):
    return [
        (id(buffer), -1 if buffer.is_inference() else buffer._version)
        for buffer in module._buffers.values()
        if buffer is not None
    ]
