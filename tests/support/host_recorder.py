"""Stands for CUDA graphs where there is no GPU."""

import contextlib

import torch
from torch.utils._pytree import tree_leaves


class HostRecorder:
    """Recorder that replays by calling the function again.

    As a graph does, replays write to the memory of the first results and run
    no code of the caller; unlike a graph's, their nodes are new ones.

    Args:
        device (torch.device): Any.

    Attributes:
        pool_bytes (int): 1 for each graph.
        broken (bool): Whether recording raises, as for a function that waits
            for the device.
    """

    broken = False

    def __init__(self, device):
        self.pool_bytes = 0
        self._forward = None

    def record(self, function, generators=()):
        """See :class:`mmactnn.graphs.recorder.Recorder`."""
        if self.broken:
            raise RuntimeError('operation not permitted when capturing')
        self.pool_bytes += 1
        if self._forward is None:
            self._forward = _Forward(function)
            return self._forward.replay, self._forward.result
        forward, self._forward = self._forward, None
        grads = function()

        def replay():
            _, wanted, grad_outputs = function.args
            found = torch.autograd.grad(
                [t for t in forward.latest if t.requires_grad],
                wanted,
                grad_outputs,
                **function.keywords,
            )
            # Captures have leaves of their own, with the same memory.
            by_place = {
                leaf.data_ptr(): grad
                for leaf, grad in zip(wanted, found)
                if grad is not None
            }
            for target, leaf in zip(grads, wanted):
                if target is not None:
                    target.copy_(by_place[leaf.data_ptr()])

        return replay, grads

    def random_states(self, count):
        """See :class:`mmactnn.graphs.recorder.Recorder`."""
        return _NoStates()


class _NoStates:
    states = ()

    def in_force(self):
        return contextlib.nullcontext()


class _Forward:
    """A forward pass that writes to the memory of its first results."""

    def __init__(self, function):
        self._function = function
        self.result = function()
        self._fixed = [x.detach() for x in _tensors(self.result)]
        self.latest = None

    def replay(self):
        # Nodes record nothing in their forward pass, and a graph has its own.
        with torch.enable_grad():
            self.latest = _tensors(self._function())
        for target, source in zip(self._fixed, self.latest):
            target.copy_(source.detach())


def _tensors(result):
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
