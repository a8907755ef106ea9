"""Mode of execution: plain eager torch, or under tracers and transforms."""

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.utils._device import DeviceContext

from .function_mode import FunctionMode

# Types of tensors that hold values and nothing else.
ORDINARY = (torch.Tensor, torch.nn.Parameter)
_functorch = torch._C._functorch
_PROXY = torch._C._TorchDispatchModeKey.PROXY
# Function modes that change no results.
_UNNOTICED = (DeviceContext, FunctionMode)


def is_ordinary(tensor):
    """Whether a tensor holds values that kernels can read, and no more.

    Args:
        tensor (object): A tensor, or an object in its place.

    Returns:
        bool: False for subclasses, proxies of tracers, tensors without
        storage (meta, fake), sparse, nested and quantised ones, and wrappers
        of functorch's transforms.
    """
    return (
        type(tensor) in ORDINARY
        and not tensor.is_meta
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not _functorch.is_functorch_wrapped_tensor(tensor)
    )


def is_transformed():
    """Whether a transform other than reverse-mode autograd is active.

    Returns:
        bool: True under ``torch.func``, forward-mode differentiation,
        ``torch.jit.trace`` and ``make_fx``.
    """
    return (
        _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and torch._C._get_dispatch_mode(_PROXY) is not None
        )
    )


def is_plain(input):
    """Whether a call runs eagerly, without transforms or function modes.

    It combines :func:`is_transformed`, function modes and, except for the
    class of the tensor, :func:`is_ordinary` in one function, as every layer
    calls it at every call.

    Args:
        input (Tensor[*]): First argument of the call.

    Returns:
        bool: True also under dispatch modes that only observe.
    """
    return (
        _functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not (
            torch._C._len_torch_dispatch_stack() > 0
            and torch._C._get_dispatch_mode(_PROXY) is not None
        )
        and not input.is_meta
        and input.layout is torch.strided
        and not input.is_nested
        and not input.is_quantized
        and not _functorch.is_functorch_wrapped_tensor(input)
        and (
            torch._C._len_torch_function_stack() == 0
            or not has_function_mode()
        )
    )


def has_function_mode():
    """Whether a function mode is active that may change results.

    Returns:
        bool: False under ``torch.device`` as a context, and the package's own
        mode.
    """
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(
        type(torch._C._get_function_stack_at(i)) not in _UNNOTICED
        for i in range(count)
    )


def is_leaf_of_trace(module, input):
    """Whether ``torch.fx`` traces a model that a module is part of.

    Args:
        module (nn.Module): The module.
        input (object): First argument of its call.

    Returns:
        bool: False also if the module itself is traced.
    """
    return (
        isinstance(input, torch.fx.Proxy)
        and getattr(input.tracer, 'root', None) is not module
    )


def record_leaf(module, args):
    """Record the call of a module in a trace of ``torch.fx``.

    Tracers do the same for torch's own layers, which are leaves by the name
    of their package.

    Args:
        module (nn.Module): The module.
        args (tuple): Arguments of its call, the first one a proxy.

    Returns:
        torch.fx.Proxy: The output.
    """
    tracer = args[0].tracer
    target = tracer.path_of_module(module)
    return tracer.create_proxy('call_module', target, args, {})


def overrides_dispatch(cls):
    """Whether a class of tensors has kernels of its own.

    Args:
        cls (type): Subclass of ``torch.Tensor``, such as ``DTensor``.

    Returns:
        bool: True if it has a ``__torch_dispatch__``.
    """
    return cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def overrides_functions(cls):
    """Whether a class of tensors sees calls of functions now.

    Args:
        cls (type): Subclass of ``torch.Tensor``.

    Returns:
        bool: False within the class's own ``__torch_function__``, and if it
        has disabled that.
    """
    return (
        torch._C._is_torch_function_enabled()
        and cls.__torch_function__
        is not torch._C._disabled_torch_function_impl
    )


def is_observed():
    """Whether global hooks or modes observe all calls.

    Returns:
        bool: True under hooks that all modules have, dispatch modes, and
        function modes (:func:`has_function_mode`).
    """
    return (
        module_hooks._has_any_global_hook()
        or torch._C._len_torch_dispatch_stack() > 0
        or has_function_mode()
    )


def refuse_script(module):
    """Refuse ``torch.jit.script``, as ``__prepare_scriptable__`` of a class.

    Args:
        module (nn.Module): The module.

    Raises:
        RuntimeError: Always: TorchScript compiles the source of a forward
            pass, and cannot read that of compressed layers.
    """
    raise RuntimeError(
        f'torch.jit.script cannot compile {type(module).__name__} of a '
        'converted model: script mmactnn.revert_model(copy.deepcopy(model)), '
        'or use torch.jit.trace or torch.export in eval mode'
    )
