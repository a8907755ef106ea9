"""One call of a part, captured."""

import contextlib
import functools

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from .state import leaves_replaced

# Constants that a captured call may return beside tensors.
_CONSTANTS = (type(None), bool, int, float, str)


class Ticket:
    """Right to the memory of a pool, from a forward pass to its backward.

    Args:
        on_finish (Callable): Called after the backward pass.

    Attributes:
        done (bool): Whether the backward pass has run.
    """

    def __init__(self, on_finish):
        self.done = False
        self._on_finish = on_finish

    def finish(self):
        """Note the backward pass."""
        self.done = True
        self._on_finish()


class CapturedCall:
    """Forward and backward pass of one call as two CUDA graphs.

    Args:
        function (Callable): Called once for the forward pass.
        args (tuple): Its arguments, nested in containers that
            ``torch.utils._pytree`` knows.
        kwargs (dict): Its keyword arguments, likewise.
        module (nn.Module): Module whose parameters get gradients.
        recorder (Recorder): Recorder of both graphs.
        device_type (str): Type of the device.
        segments (int, optional): Calls of segments at most. Defaults to 0.

    Raises:
        TypeError: If the call returns something that is not a tensor on the
            device or a constant.
        RuntimeError: If the passes cannot be captured.
    """

    def __init__(
        self,
        function,
        args,
        kwargs,
        module,
        recorder,
        device_type,
        segments=0,
    ):
        leaves, spec = tree_flatten((args, kwargs))
        self._inputs = [
            _static(leaf) if isinstance(leaf, torch.Tensor) else None
            for leaf in leaves
        ]
        given = [
            leaf if static is None else static
            for leaf, static in zip(leaves, self._inputs)
        ]

        def forward():
            static_args, static_kwargs = tree_unflatten(given, spec)
            with _uncached_autocast(device_type):
                return function(*static_args, **static_kwargs)

        random = recorder.random_states(segments)
        with (
            leaves_replaced(module) as leaves,
            torch.enable_grad(),
            random.in_force(),
        ):
            self._replay, result = recorder.record(
                forward, [state.first for state in random.states]
            )
        results, self._spec = tree_flatten(result)
        _check_results(results, device_type)
        differentiable = [
            leaf
            for leaf in results
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        self._grad_outputs = [
            torch.zeros_like(leaf) for leaf in differentiable
        ]
        # Whose gradient each of the wanted ones is: the place of an input, or
        # a parameter. Code that has a parameter from elsewhere reads itself.
        targets = [
            (tensor, index)
            for index, tensor in enumerate(self._inputs)
            if tensor is not None
        ]
        for parameter in module.parameters():
            for leaf in {leaves.get(parameter, parameter), parameter}:
                targets.append((leaf, parameter))
        targets = [(t, target) for t, target in targets if t.requires_grad]
        grads = ()
        self._replay_backward = None
        if differentiable:
            self._replay_backward, grads = recorder.record(
                functools.partial(
                    torch.autograd.grad,
                    differentiable,
                    [tensor for tensor, _ in targets],
                    self._grad_outputs,
                    allow_unused=True,
                ),
                [state.again for state in random.states],
            )
        found = [
            (target, grad)
            for (_, target), grad in zip(targets, grads)
            if grad is not None
        ]
        self._targets = [target for target, _ in found]
        self._grads = [grad for _, grad in found]
        # Without their nodes, whose tensors are the pool's.
        self._results = [
            leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
            for leaf in results
        ]
        self._is_differentiable = [
            isinstance(leaf, torch.Tensor) and leaf.requires_grad
            for leaf in results
        ]

    def __call__(self, args, kwargs, ticket):
        """Replay the forward pass.

        Args:
            args (tuple): Arguments of the same shapes.
            kwargs (dict): Keyword arguments, likewise.
            ticket (Ticket): Held until the backward pass.

        Returns:
            object: Result, in memory that the next replay writes to.
        """
        leaves, _ = tree_flatten((args, kwargs))
        for leaf, static in zip(leaves, self._inputs):
            if static is not None:
                static.detach().copy_(leaf.detach())
        sources = [
            leaves[target] if isinstance(target, int) else target
            for target in self._targets
        ]
        tensors = _Replay.apply(self, ticket, *sources)
        found = iter(tensors)
        return tree_unflatten(
            [
                next(found) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in self._results
            ],
            self._spec,
        )

    def run_forward(self):
        """Replay the forward graph.

        Returns:
            tuple[list[Tensor], list[Tensor]]: New views of the results, and
            those of them that carry no gradient.
        """
        self._replay()
        views, constant = [], []
        for leaf, differentiable in zip(
            self._results, self._is_differentiable
        ):
            if isinstance(leaf, torch.Tensor):
                views.append(leaf.detach())
                if not differentiable:
                    constant.append(views[-1])
        return views, constant

    @property
    def results(self):
        """list[Tensor]: Tensors among the results, where graphs write."""
        return [x for x in self._results if isinstance(x, torch.Tensor)]

    @property
    def versions(self):
        """tuple[int]: Counts of writes to the results."""
        return tuple(result._version for result in self.results)

    def run_backward(self, grad_outputs):
        """Replay the backward graph.

        Args:
            grad_outputs (Sequence[Tensor | None]): Gradients of all tensors
                among the results.

        Returns:
            list[Tensor]: Gradients of the inputs and parameters that have
            one, in new memory.
        """
        flags = [
            flag
            for leaf, flag in zip(self._results, self._is_differentiable)
            if isinstance(leaf, torch.Tensor)
        ]
        wanted = (g for g, flag in zip(grad_outputs, flags) if flag)
        for static, grad in zip(self._grad_outputs, wanted):
            if grad is None:
                static.zero_()
            else:
                static.copy_(grad)
        self._replay_backward()
        # Copies: the next replay writes to them, while gradients accumulate.
        return [grad.clone() for grad in self._grads]


class _Replay(torch.autograd.Function):
    """Node of a captured call."""

    @staticmethod
    def forward(ctx, call, ticket, *tensors):
        ctx.set_materialize_grads(False)
        views, constant = call.run_forward()
        ctx.mark_non_differentiable(*constant)
        ctx.call, ctx.ticket, ctx.versions = call, ticket, call.versions
        return tuple(views)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        if ctx.ticket.done:
            raise RuntimeError(
                'backward a second time through a part that runs as a CUDA '
                'graph: its memory is in use again. Take the part out of '
                'cuda_graphs, or call backward once'
            )
        if ctx.versions != ctx.call.versions:
            raise RuntimeError(
                'an output of a part that runs as a CUDA graph was written '
                'to in place. Its backward pass may read it: take the part '
                'out of cuda_graphs, or write to a copy'
            )
        grads = ctx.call.run_backward(grad_outputs)
        ctx.ticket.finish()
        return None, None, *grads


def _static(tensor):
    """Memory of a graph for an argument."""
    with torch.no_grad():
        static = torch.empty_like(tensor).copy_(tensor)
    return static.requires_grad_(tensor.requires_grad)


def _uncached_autocast(device_type):
    """Autocast as in force, but for its cache.

    It holds copies of weights that were made outside of the graph.
    """
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype, cache_enabled=False)


def _check_results(results, device_type):
    for leaf in results:
        if isinstance(leaf, torch.Tensor):
            if leaf.device.type != device_type:
                raise TypeError(
                    'a part in a CUDA graph must return tensors on the GPU, '
                    f'got one on {leaf.device}'
                )
        elif not isinstance(leaf, _CONSTANTS):
            raise TypeError(
                'a part in a CUDA graph must return tensors and constants, '
                f'got {type(leaf).__name__}'
            )
