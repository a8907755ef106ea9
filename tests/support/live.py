"""Follows the memory of tensors, on devices that do not count it."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside of the block.

    Attributes:
        peak (int): Most bytes of them that lived at once.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an op and take note of what it made."""
        out = func(*args, **(kwargs or {}))
        old = {_key(x) for x in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            key = _key(tensor)
            if key in old or key in self._live:
                continue
            storage = tensor.untyped_storage()
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, key, None)
        self.peak = max(self.peak, sum(self._live.values()))
        return out


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _key(tensor):
    return tensor.untyped_storage()._cdata
