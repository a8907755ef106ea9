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
        self._latest = None

    def record(self, function, generators=()):
        """See :class:`mmactnn.graphs.recorder.Recorder`."""
        if self.broken:
            raise RuntimeError('operation not permitted when capturing')
        self.pool_bytes += 1
        if self._latest is None:
            result = function()
            fixed = [x.detach() for x in _tensors(result)]
            self._latest = _tensors(result)

            def replay():
                # In another graph's backward pass, nothing is recorded.
                with torch.enable_grad():
                    self._latest = _tensors(function())
                _copy(fixed, self._latest)

            return replay, result
        grads, self._latest = function(), None

        def replay_backward():
            _, wanted, grad_outputs = function.args
            found = torch.autograd.grad(
                [t for t in self._latest if t.requires_grad],
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
            places = [leaf.data_ptr() for leaf in wanted]
            for target, place in zip(grads, places):
                if target is not None:
                    target.copy_(by_place[place])

        return replay_backward, grads

    def random_states(self, count):
        """See :class:`mmactnn.graphs.recorder.Recorder`."""
        return _NoStates()


class _NoStates:
    states = ()

    def in_force(self):
        return contextlib.nullcontext()


def _tensors(result):
    return [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


def _copy(fixed, found):
    for target, source in zip(fixed, found):
        target.copy_(source.detach())
