"""Dispatch of compressed layers between codes and their torch parent.

A layer's ``forward`` passes two functions, its own and that of its torch
parent, and :func:`run` calls one of them. The parent's function runs wherever
its exact result is required or the other one could not be traced:

- in evaluation, without gradients, at level L0, and for a reverted layer
  whose bound method is still in use;
- for tensors that are more, or less, than values: subclasses with kernels of
  their own (``DTensor``), fake, meta, nested and quantised ones;
- under transforms (``torch.func``, forward-mode differentiation,
  ``torch.jit.trace``, ``make_fx``), ``torch.export`` and function modes;
- if a function of the parent's forward pass was replaced since the layer was
  registered.

Functions that a layer calls have no handlers (:mod:`.modules.function_mode`).
``torch.fx`` records a layer as a leaf, and ``torch.compile`` excludes layers
that keep codes from its graph.
"""

import functools
import inspect
import weakref

import torch
from torch.compiler import is_dynamo_compiling

from ..modules.execution import (
    ORDINARY,
    is_leaf_of_trace,
    is_plain,
    overrides_dispatch,
    overrides_functions,
    record_leaf,
)
from ..modules.function_mode import active_mode, call_outside
from ..registry import default_registry


def run(layer, parent, compressed, args, parameters=(), without_grad=False):
    """Call a layer's own function or that of its torch parent.

    Args:
        layer (nn.Module): The layer; a plain one if it was reverted.
        parent (Callable): Function of the parent, called with the layer and
            ``args``.
        compressed (Callable): Function that keeps codes, called likewise.
        args (tuple): Arguments, the input first.
        parameters (Sequence[Tensor | None]): Further tensors that may need a
            gradient.
        without_grad (bool, optional): Whether to keep codes where nothing
            needs a gradient, too. Defaults to False.

    Returns:
        Tensor: The output.
    """
    if is_dynamo_compiling():
        return _run_compiled(
            layer, parent, compressed, args, parameters, without_grad
        )
    if torch._C._len_torch_function_stack() and active_mode() is not None:
        return call_outside(
            run, layer, parent, compressed, args, parameters, without_grad
        )
    input = args[0]
    if type(input) not in ORDINARY:
        return _run_on_subclass(
            layer, parent, compressed, args, parameters, without_grad
        )
    if keeps_codes(layer, input, parameters, without_grad):
        return compressed(layer, *args)
    return parent(layer, *args)


def keeps_codes(layer, input, parameters=(), without_grad=False):
    """Whether a call keeps codes.

    Args:
        layer (nn.Module): See :func:`run`.
        input (Tensor[*]): First argument, of any class.
        parameters (Sequence[Tensor | None]): See :func:`run`.
        without_grad (bool, optional): See :func:`run`. Defaults to False.

    Returns:
        bool: False in the cases that the module lists.
    """
    # Conditions that most calls without codes fail come first.
    quantizer = layer.__dict__.get('quantizer')
    if quantizer is None or quantizer.bits is None:
        return False
    cache = quantizer.cache
    if layer.training:
        cache.trained = weakref.ref(layer)
        layer_bits = quantizer.layer_bits
        if layer_bits is not None and (
            layer_bits.precision.due or not layer_bits.called
        ):
            layer_bits.begin_call()
    elif not (layer.keeps_codes_frozen and cache.in_training_pass):
        return False
    needed = without_grad
    if not needed:
        if not torch.is_grad_enabled():
            return False
        needed = input.requires_grad
    for tensor in parameters:
        if tensor is not None:
            if type(tensor) not in ORDINARY or tensor.is_meta:
                return False
            needed = needed or tensor.requires_grad
    if not needed or not is_plain(input):
        return False
    parent, functions = _parent_functions(type(layer))
    for name, function in functions:
        # It may have been replaced for all layers.
        if getattr(parent, name, None) is not function:
            return False
    return True


@functools.cache
def _parent_functions(cls):
    """Torch parent, and its functions as they were registered."""
    entry = default_registry.entry_of(cls)
    if entry is None:
        return cls, ()
    return entry.parent, tuple(
        (name, function)
        for name, function in entry.functions.items()
        # Attributes that are created at every access cannot be compared.
        if inspect.isfunction(function) or isinstance(function, property)
    )


def _run_compiled(layer, parent, compressed, args, parameters, without_grad):
    quantizer = getattr(layer, 'quantizer', None)
    if (
        quantizer is None
        or quantizer.bits is None
        or not layer.training
        or not (without_grad or torch.is_grad_enabled())
    ):
        return parent(layer, *args)
    from ..modules.graph_break import call_outside_graph

    return call_outside_graph(
        _run_eager, layer, parent, compressed, args, parameters, without_grad
    )


def _run_eager(layer, parent, compressed, args, parameters, without_grad):
    return run(layer, parent, compressed, args, parameters, without_grad)


def _run_on_subclass(
    layer, parent, compressed, args, parameters, without_grad
):
    input = args[0]
    if is_leaf_of_trace(layer, input):
        return record_leaf(layer, args)
    cls = type(input)
    if (
        not isinstance(input, torch.Tensor)
        or overrides_dispatch(cls)
        or not keeps_codes(layer, input, parameters, without_grad)
    ):
        return parent(layer, *args)
    if not overrides_functions(cls):
        return compressed(layer, *args)
    # The subclass sees the call through its protocol and makes the output.
    output = cls.__torch_function__(compressed, (cls,), (layer, *args), {})
    if output is NotImplemented:
        return parent(layer, *args)
    return output
