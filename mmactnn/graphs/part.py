"""Part of a model that runs as CUDA graphs where its shapes repeat."""

import contextlib
import copy
import functools
import weakref
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_flatten

from ..codes.hooks import keep_tensors, meter_in_force, top_hooks
from ..codes.units import MIB
from ..memory.meter import measure_activations
from ..modules.execution import is_observed, is_ordinary, is_transformed
from ..modules.function_mode import call_outside
from ..ops.capture import is_capturing
from ..segments import is_segment
from .call import CapturedCall, Ticket
from .recorder import Recorder
from .state import ModuleState, find_hook


class GraphStats(NamedTuple):
    """Use of the graphs of a part.

    Attributes:
        graphs (int): Kinds of calls that have graphs now.
        replays (int): Calls that a graph has answered.
        eager (int): Other calls in training.
        pool_mib (float): Memory that the graphs hold, in MiB (2^20 bytes).
    """

    graphs: int
    replays: int
    eager: int
    pool_mib: float

    def __str__(self):
        return (
            f'CUDA graphs of {self.graphs} kinds of calls, '
            f'{self.pool_mib:.0f} MiB; '
            f'{self.replays} calls replayed, {self.eager} run by the host'
        )


# Attribute of a module that torch calls in place of it, as of a compiled one.
# Functions of the module stay as they are, so that blocks of it can be fused.
CALL = '_compiled_call_impl'

# Captures in a row that were replayed less often than that are no use.
_MAX_WASTED = 4
_MIN_REPLAYS = 8


class _Seen:
    """A kind of call.

    Attributes:
        calls (int): How often the host ran it.
        captured (CapturedCall, optional): Its graphs.
        state (ModuleState, optional): State of the module at their capture.
        bits (tuple[float]): Adaptive bits at their capture.
        amounts (Amounts, optional): Memory that the call keeps.
        reports (CapturedReports, optional): Reports on adaptive bits.
        replays (int): How often they were replayed.
        wasted (int): Captures in a row that were hardly replayed.
    """

    def __init__(self):
        self.calls = self.wasted = self.replays = 0
        self.bits = ()
        self._drop()

    def _drop(self):
        self.captured = self.state = self.amounts = self.reports = None
        self.replays = 0

    def forget(self):
        """Drop the graphs. A call by the host comes before new ones."""
        is_waste = self.replays < _MIN_REPLAYS
        self.wasted = self.wasted + 1 if is_waste else 0
        self.calls -= 1
        self._drop()


class GraphedPart:
    """Method of a module that runs as CUDA graphs in training.

    A call is of the same kind as another if shapes, strides and dtypes of its
    tensors, its other arguments and the dtype of autocast are equal. The
    first calls of a kind run as usual, the next one is captured, and later
    ones are replayed, as long as the module's state is as it was. The method
    runs as usual in evaluation, in a checkpointed block, under hooks for
    saved tensors, and while an earlier call waits for its backward pass.
    Calls that report on adaptive bits are a kind of their own.

    Args:
        module (nn.Module): The module.
        method (str): Name of the method; ``CALL`` is the call of the module.
        name (str): Name of the part in messages.
        max_graphs (int): Kinds of calls that get graphs, the first ones.
        warmup (int): Calls of a kind before it is captured.
        precision (AdaptivePrecision, optional): Precision of the model.
        make_recorder (Callable, optional): Maps a device to a recorder.
        device_type (str, optional): Type of the devices that have graphs.
    """

    def __init__(
        self,
        module,
        method,
        name,
        max_graphs,
        warmup,
        precision=None,
        make_recorder=Recorder,
        device_type='cuda',
    ):
        self._module = module
        self._method = method
        self._name = name
        self._max_graphs = max_graphs
        self._warmup = warmup
        self._precision = precision
        self._make_recorder = make_recorder
        self._device_type = device_type
        # Calls without and with reports.
        self._seen = ({}, {})
        self._recorder = None
        self._ticket = None
        self._replays = self._eager = 0

    @property
    def stats(self):
        """GraphStats: Use of the graphs."""
        pool = 0 if self._recorder is None else self._recorder.pool_bytes
        graphs = sum(map(_count, self._seen))
        return GraphStats(graphs, self._replays, self._eager, pool / MIB)

    @property
    def plain(self):
        """Callable: The method without graphs."""
        if self._method == CALL:
            # The call without what torch calls in its place.
            return self._module._call_impl
        function = getattr(type(self._module), self._method)
        return function.__get__(self._module)

    def __call__(self, *args, **kwargs):
        """Call the method.

        Args:
            *args (object): Its arguments.
            **kwargs (object): Its keyword arguments.

        Returns:
            object: Its result. In training it lies in memory that the next
            call writes to.

        Raises:
            RuntimeError: If the method cannot be captured, or depends on
                something that changes with every call.
        """
        module = self._module
        if not module.training or not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if not _is_plain_call(leaves, self._device_type):
            return self.plain(*args, **kwargs)
        precision = self._precision
        if precision is not None:
            # This is a call of the adaptive layers within.
            if precision.due:
                precision.on_call()
        try:
            kind = self._kind(leaves, spec)
        except TypeError:
            # An argument without a hash.
            return self._run(args, kwargs)
        reports = precision is not None and precision.collecting
        seen = self._seen[reports].setdefault(kind, _Seen())
        if seen.captured is not None:
            self._check(seen)
        if seen.captured is None and seen.calls < self._warmup:
            return self._warm_up(seen, args, kwargs)
        if self._is_busy():
            return self._run(args, kwargs)
        if seen.captured is None:
            if _count(self._seen[reports]) >= self._max_graphs:
                return self._run(args, kwargs)
            self._capture(seen, args, kwargs)
        return self._replay(seen, args, kwargs)

    def _check(self, seen):
        """Drop graphs of another state of the module."""
        if seen.bits == self._bits() and seen.state.holds():
            return
        if seen.wasted >= _MAX_WASTED:
            raise RuntimeError(
                f'{self._name} cannot run as a CUDA graph: it changes all the '
                f'time, lately in {seen.state.find_change()}. Take it out of '
                'cuda_graphs, or name the modules that it calls instead'
            )
        seen.forget()
        if not any(map(_count, self._seen)):
            # A pool without graphs is no longer valid.
            self._recorder = None

    def _bits(self):
        if self._precision is None:
            return ()
        return tuple(layer.bits for layer in self._precision.layers)

    def _run(self, args, kwargs):
        self._eager += 1
        return self.plain(*args, **kwargs)

    def _kind(self, leaves, spec):
        device = self._device_type
        autocast = torch.is_autocast_enabled(device)
        kind = (
            str(spec),
            tuple(
                (
                    leaf.shape,
                    leaf.stride(),
                    leaf.dtype,
                    leaf.device,
                    leaf.requires_grad,
                )
                if isinstance(leaf, torch.Tensor)
                else leaf
                for leaf in leaves
            ),
            autocast and torch.get_autocast_dtype(device),
        )
        hash(kind)
        return kind

    def _is_busy(self):
        """Whether a call waits for its backward pass."""
        ticket = None if self._ticket is None else self._ticket()
        return ticket is not None and not ticket.done

    def _warm_up(self, seen, args, kwargs):
        state = self._state()
        result = self._run(args, kwargs)
        change = state.find_change()
        # Earlier calls may prepare things once.
        if change is not None and seen.calls + 1 == self._warmup > 1:
            raise RuntimeError(
                f'{self._name} cannot run as a CUDA graph: its forward pass '
                f'sets the attribute {change}, and a replay would not. Take '
                'it out of cuda_graphs'
            )
        seen.calls += 1
        return result

    def _capture(self, seen, args, kwargs):
        module = self._module
        hooked = find_hook(module, self._method == CALL)
        if hooked is not None:
            raise RuntimeError(
                f'{self._name} cannot run as a CUDA graph: {hooked} has '
                'hooks, which a replay would not call. Remove them, or take '
                'it out of cuda_graphs'
            )
        if self._recorder is None:
            device = next(
                leaf.device
                for leaf in tree_flatten((args, kwargs))[0]
                if isinstance(leaf, torch.Tensor)
            )
            self._recorder = self._make_recorder(device)
        # Outside of the meter of this step, if there is one.
        try:
            with (
                measure_activations(module) as meter,
                self._capturing_reports() as reports,
            ):
                captured = CapturedCall(
                    self.plain,
                    args,
                    kwargs,
                    module,
                    self._recorder,
                    self._device_type,
                    sum(map(is_segment, module.modules())),
                )
        except (RuntimeError, TypeError) as error:
            raise RuntimeError(
                f'{self._name} cannot be captured in a CUDA graph: {error}. '
                'Take it out of cuda_graphs'
            ) from error
        seen.captured, seen.reports = captured, reports
        seen.state, seen.bits = self._state(), self._bits()
        seen.amounts = meter.amounts(captured.results)

    def _state(self):
        return ModuleState(self._module, self._method == CALL)

    def _capturing_reports(self):
        if self._precision is None:
            return contextlib.nullcontext()
        return self._precision.capturing_reports()

    def _replay(self, seen, args, kwargs):
        self._replays += 1
        seen.replays += 1
        ticket = Ticket(functools.partial(self._finish, seen.reports))
        self._ticket = weakref.ref(ticket)
        meter = meter_in_force()
        if meter is not None:
            meter.add(seen.amounts, seen.captured.results)
        return call_outside(seen.captured, args, kwargs, ticket)

    def _finish(self, reports):
        """Do what layers do at the end of their backward pass."""
        if reports is not None:
            reports.hand_over()
            self._precision.due = True

    def __deepcopy__(self, memo):
        """A part of the copied module, without graphs."""
        return GraphedPart(
            copy.deepcopy(self._module, memo),
            self._method,
            self._name,
            self._max_graphs,
            self._warmup,
            copy.deepcopy(self._precision, memo),
            self._make_recorder,
            self._device_type,
        )

    def __getstate__(self):
        """For pickle: without graphs."""
        state = dict(
            self.__dict__, _seen=({}, {}), _recorder=None, _ticket=None
        )
        return dict(state, _replays=0, _eager=0)


def _count(seen):
    return sum(kind.captured is not None for kind in seen.values())


def _is_plain_call(leaves, device_type):
    """Whether a call reads tensors of one GPU, and nothing intervenes."""
    if (
        torch.compiler.is_compiling()
        or is_transformed()
        or is_observed()
        or torch._C._current_graph_task_id() != -1
        or is_capturing()
        or not (top_hooks(True) is None or meter_in_force() is not None)
        or not keep_tensors()
    ):
        return False
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return (
        bool(tensors)
        and all(map(is_ordinary, tensors))
        and tensors[0].device.type == device_type
        and all(t.device == tensors[0].device for t in tensors)
    )
