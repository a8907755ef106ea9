"""Batch statistics in segments, which the second run must not update."""

import contextlib
import functools
import inspect

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def modules_of(function, inputs):
    """Normalisations with running statistics that a function may run.

    Args:
        function (Callable): A module, a method of one, a function with
            modules in its closure, or a partial of these.
        inputs (Iterable): Its arguments.

    Returns:
        list[nn.Module]: The normalisations, of modules found there.
    """
    roots = [*_owners(function)]
    roots += (value for value in inputs if isinstance(value, nn.Module))
    norms = {
        part: None
        for root in roots
        for part in root.modules()
        if isinstance(part, _NormBase)
        and part.training
        and part.running_mean is not None
    }
    return list(norms)


def _owners(function):
    if isinstance(function, nn.Module):
        yield function
    elif isinstance(function, functools.partial):
        yield from _owners(function.func)
        yield from filter(_is_module, function.args)
        yield from filter(_is_module, function.keywords.values())
    elif inspect.ismethod(function):
        if _is_module(function.__self__):
            yield function.__self__
    else:
        for cell in getattr(function, '__closure__', None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                if _is_module(cell.cell_contents):
                    yield cell.cell_contents


def _is_module(value):
    return isinstance(value, nn.Module)


@contextlib.contextmanager
def frozen_statistics(modules):
    """Discard updates of running statistics, as a context.

    Copies take the place of the buffers: to write the old values back would
    invalidate buffers that autograd has saved.

    Args:
        modules (Sequence[nn.Module]): Normalisations.
    """
    buffers = [(module, dict(module._buffers)) for module in modules]
    try:
        for module, before in buffers:
            module._buffers.update(
                {
                    name: buffer.clone()
                    for name, buffer in before.items()
                    if buffer is not None
                }
            )
        yield
    finally:
        for module, before in buffers:
            module._buffers.update(before)
