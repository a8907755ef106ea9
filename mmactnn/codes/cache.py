"""Payloads of the tensors that the layers of a model read."""

import contextlib
import ctypes
import functools
import weakref
import zlib
from typing import NamedTuple

import torch

from ..ops.capture import is_capturing
from ..ops.layout import dense

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Entry(NamedTuple):
    reference: weakref.ref
    payload: object
    version: int
    # What tensors that were saved then went through, and whether into a graph.
    context: tuple
    checksum: int | None


class PayloadCache:
    """Payloads that the layers of one model share within a pass.

    A payload is found by the tensor object that it stands for, and goes with
    it: entries hold weak references. Copies and pickles start empty.

    A tensor that was written to since has no payload any more. Its version
    counter tells that, through views and ``detach()`` as well. What no counter
    sees, such as ``tensor.data.mul_(2)`` or NumPy, a checksum of the values
    tells on the CPU. On CUDA it would make the host wait for the device: there
    a tensor must not be written to through ``.data`` between two layers that
    read it.

    Attributes:
        trained (weakref.ref, optional): The layer that was last called in
            training mode.
    """

    def __init__(self):
        self.trained = None
        self._entries = {}
        self._blocks = set()

    def put(self, tensor, payload, checked=True):
        """Let the layers that read a tensor find its payload.

        Args:
            tensor (Tensor[N, *]): What the payload stands for. That of a leaf
                is not shared but within a block (:meth:`in_block`): a leaf may
                be read in many passes, all of which would round alike.
            payload (Payload): Its payload.
            checked (bool, optional): Whether the tensor can be seen by others
                than layers of the model. Defaults to True.
        """
        key = id(tensor)
        if tensor.grad_fn is None and key not in self._blocks:
            return
        entries = self._entries
        entries[key] = _Entry(
            # With the tensor its address may go to another one.
            weakref.ref(tensor, functools.partial(entries.pop, key)),
            payload,
            tensor._version,
            (_saved_tensors_hooks(True), tensor.is_cuda and is_capturing()),
            checksum(tensor) if checked and tensor.is_cpu else None,
        )

    def get(self, tensor):
        """The payload of a tensor, if a layer has one already.

        Args:
            tensor (Tensor[*]): What a layer reads.

        Returns:
            Payload, optional: None also if the tensor was modified since, and
            in a checkpointed block for what was made outside of it: the second
            forward pass of the block would not find it. The same holds for a
            CUDA graph: its replays read other values from the same tensor.
        """
        entry = self._entries.get(id(tensor))
        if entry is None:
            return None
        context = (
            _saved_tensors_hooks(True),
            tensor.is_cuda and is_capturing(),
        )
        if (
            entry.reference() is not tensor
            or entry.version != tensor._version
            or entry.context != context
            or (
                entry.checksum is not None
                and entry.checksum != checksum(tensor)
            )
        ):
            return None
        return entry.payload

    @contextlib.contextmanager
    def in_block(self, tensor):
        """Let the layers of a block share the payload of its input, a leaf.

        Args:
            tensor (Tensor[N, *]): The input. It has no payload any more when
                the block is through.
        """
        key = id(tensor)
        self._blocks.add(key)
        try:
            yield
        finally:
            self._blocks.discard(key)
            self._entries.pop(key, None)

    @property
    def in_training_pass(self):
        """bool: Whether the model that a frozen layer is in is trained.

        The layer itself, in eval mode, cannot tell. The last one that was
        called in training mode can: in evaluation it is not any more.
        """
        layer = self.trained and self.trained()
        return layer is not None and layer.training

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()


# Layers that no conversion has given their model's share this one.
default_cache = PayloadCache()


def checksum(tensor):
    """Checksum of all values, in their order.

    Args:
        tensor (Tensor[*]): Any layout and dtype, on the CPU.

    Returns:
        int: CRC-32 of the memory, without its gaps.
    """
    if not tensor.is_contiguous():
        tensor = dense(tensor.detach())
    nbytes = tensor.nbytes
    if not nbytes:
        return 0
    memory = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    return zlib.crc32(memory)
