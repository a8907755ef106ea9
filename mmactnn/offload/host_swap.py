"""Swapping of a model's saved tensors to the host."""

import itertools
import threading
import weakref

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..codes.units import MIB
from ..ops.capture import refuse_capture
from .engine import SwapEngine
from .host_pool import default_max_bytes
from .transport import CudaTransport


class HostSwap:
    """Keeps saved tensors of a model in pinned host memory.

    While the model runs forward with gradients enabled, tensors on its GPU
    that autograd saves are copied to the host and freed; the backward pass
    fetches them ahead of time. Copies run beside the computation and never
    block the host. Gradients are the same, bit for bit.

    Parameters, buffers and small tensors stay on the device. A tensor that is
    still alive on the device is not fetched.

    A copy of the model (``copy.deepcopy``, pickle) swaps with streams and
    memory of its own.

    Args:
        model (nn.Module): The model, with or without a wrapper, on one GPU.
        min_bytes (int, optional): Tensors in smaller storages stay on the
            device. Defaults to 1 MiB, below which a copy costs the host more
            than it saves.
        max_host_mib (float, optional): Most host memory to pin, in MiB.
            Defaults to 80 % of available memory, shared among the processes
            of a launch (``LOCAL_WORLD_SIZE``).
        window_mib (float, optional): Device memory, in MiB, that copies under
            way may hold in each direction. Beyond it the computation waits
            for them. Defaults to 512.
        transport (Callable, optional): Makes the object that copies from a
            device. Defaults to :class:`CudaTransport`.

    Raises:
        ValueError: If a size is negative, or a limit is not positive.

    Examples:
        >>> swap = HostSwap(model).attach()
        >>> model(images).sum().backward()
        >>> print(f'{swap.swapped_bytes / 2**20:.1f} MiB were on the host')
    """

    def __init__(
        self,
        model,
        min_bytes=MIB,
        max_host_mib=None,
        window_mib=512,
        transport=CudaTransport,
    ):
        if min_bytes < 0:
            raise ValueError(f'min_bytes must be 0 or more, got {min_bytes}')
        if max_host_mib is not None and max_host_mib <= 0:
            raise ValueError(
                f'max_host_mib must be positive, got {max_host_mib}'
            )
        if window_mib <= 0:
            raise ValueError(f'window_mib must be positive, got {window_mib}')
        self.min_bytes = min_bytes
        self.max_host_mib = max_host_mib
        self.window_mib = window_mib
        self._transport = transport
        self._prepare(model)

    def _prepare(self, model):
        # The model owns this object through its hooks. A strong reference
        # back would leave both to the garbage collector.
        self._model = weakref.ref(model)
        self._engine = None
        self._observer = None
        self._local = threading.local()

    @property
    def model(self):
        """nn.Module: The model; None if it was deleted."""
        return self._model()

    @property
    def swapped_bytes(self):
        """int: Bytes that the last forward pass put on the host."""
        return self._engine.pass_bytes if self._engine else 0

    @property
    def host_bytes(self):
        """int: Host memory that is pinned, in use or not."""
        return self._engine.pool.nbytes if self._engine else 0

    @property
    def window_bytes(self):
        """int: Device memory that running copies hold at the moment."""
        return self._engine.window_bytes if self._engine else 0

    @property
    def observer(self):
        """Callable: Called with each saved tensor and whether it is swapped.

        Only the innermost pair of hooks is called, so that hooks from before
        this object's see none of the model's saved tensors.
        """
        return self._observer

    @observer.setter
    def observer(self, observer):
        self._observer = observer
        if self._engine is not None:
            self._engine.observer = observer

    def attach(self):
        """Start swapping.

        Returns:
            HostSwap: This object.

        Raises:
            RuntimeError: If the model swaps already.
        """
        if attached_swap(self.model) is not None:
            raise RuntimeError(
                'the model swaps already; detach() that HostSwap first'
            )
        # Before all other hooks; the second one is also called if one of them
        # raises.
        self.model.register_forward_pre_hook(self._enter, prepend=True)
        self.model.register_forward_hook(self._leave, always_call=True)
        return self

    def detach(self):
        """Stop swapping.

        A backward pass can still fetch tensors from the host.
        """
        model = self.model
        if model is None or attached_swap(model) is not self:
            return
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [
                k for k, hook in hooks.items() if _owner(hook) is self
            ]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)
        if self._engine is not None:
            self._engine.settle()

    def is_on_top(self):
        """bool: Whether tensors that are saved now reach this object."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return (
            hooks is not None
            and self._engine is not None
            and hooks[0] == self._engine.pack
        )

    def _enter(self, module, args):
        entered = self._entered()
        # A second pair would hide existing hooks, and those that checkpointing
        # has added on top.
        inside = any(hooks is not None for hooks in entered)
        entered.append(None)
        if inside or not torch.is_grad_enabled():
            return
        engine = self._engine_for(module)
        if engine is None:
            return
        refuse_capture(
            'swapping to the host cannot be captured in a CUDA graph: the '
            'host decides in every pass what to copy and when. Capture the '
            "model at a level that does not swap, such as 'L3', or detach() "
            'the HostSwap'
        )
        engine.begin_pass(
            itertools.chain(module.parameters(), module.buffers())
        )
        hooks = saved_tensors_hooks(engine.pack, engine.unpack)
        hooks.__enter__()
        entered[-1] = hooks

    def _leave(self, module, args, output):
        entered = self._entered()
        # Empty if another hook raised before this object's was called.
        hooks = entered.pop() if entered else None
        if hooks is not None:
            hooks.__exit__()

    def _entered(self):
        """Running forward passes of this thread, to which hooks belong."""
        if not hasattr(self._local, 'entered'):
            self._local.entered = []
        return self._local.entered

    def _engine_for(self, module):
        """The engine, or None if the model runs on the CPU."""
        device = self._device_of(module)
        if device is None:
            return None
        if self._engine is None or self._engine.device != device:
            max_bytes = default_max_bytes()
            if self.max_host_mib is not None:
                max_bytes = int(self.max_host_mib * MIB)
            self._engine = SwapEngine(
                self._transport(device),
                self.min_bytes,
                max_bytes,
                int(self.window_mib * MIB),
            )
            self._engine.observer = self._observer
        return self._engine

    def _device_of(self, module):
        wanted = self._transport.device_type
        devices = {parameter.device for parameter in module.parameters()}
        if len(devices) == 1 and next(iter(devices)).type == wanted:
            return devices.pop()
        if not module.training:
            return None
        names = ', '.join(sorted(str(device) for device in devices))
        if any(device.type != wanted for device in devices):
            raise RuntimeError(
                'swapping to the host needs a model on a CUDA device, but '
                f'parameters are on {names}. Move the model there before it '
                "trains, or choose a level that does not swap: 'L3' keeps 2 "
                "bits an element, 'L0' is exact"
            )
        raise RuntimeError(
            'swapping to the host needs a model on one CUDA device, but its '
            f'parameters are on {names or "none"}'
        )

    def __getstate__(self):
        """For copies and pickle: settings and the model only."""
        return dict(
            settings=(
                self.min_bytes,
                self.max_host_mib,
                self.window_mib,
                self._transport,
            ),
            model=self.model,
        )

    def __setstate__(self, state):
        """Undo :meth:`__getstate__`."""
        (
            self.min_bytes,
            self.max_host_mib,
            self.window_mib,
            self._transport,
        ) = state['settings']
        self._prepare(state['model'])


def attached_swap(model):
    """Find the object that swaps a model's saved tensors.

    Args:
        model (nn.Module): The model.

    Returns:
        HostSwap: The object, or None.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be an nn.Module, got {type(model).__name__}'
        )
    for hook in model._forward_pre_hooks.values():
        if isinstance(_owner(hook), HostSwap):
            return _owner(hook)
    return None


def _owner(hook):
    return getattr(hook, '__self__', None)
