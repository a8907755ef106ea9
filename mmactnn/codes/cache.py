"""Cache of the payloads that layers of a model share."""

import contextlib
import ctypes
import functools
import weakref
import zlib
from typing import NamedTuple

from ..ops.capture import is_capturing
from ..ops.layout import dense
from .hooks import top_hooks


class _Entry(NamedTuple):
    reference: weakref.ref
    payload: object
    version: int
    # Saved-tensor hooks in force, and whether a CUDA graph was captured.
    context: tuple
    checksum: int | None


class PayloadCache:
    """Payloads that the layers of one model share within a pass.

    A payload is found by the tensor object that it stands for, and goes with
    it: entries hold weak references. Copies and pickles start empty.

    A tensor that was written to has no payload any more. Its version counter
    tells that, also for writes through views and ``detach()``. Writes that
    bypass the counter, such as ``tensor.data.mul_(2)`` or NumPy's, are found
    on the CPU by a checksum of the values. On CUDA a checksum would make the
    host wait for the device: there a tensor must not be written to through
    ``.data`` between two layers that read it.

    Attributes:
        trained (weakref.ref, optional): Layer that was last called in
            training mode.
    """

    def __init__(self):
        self.trained = None
        self._entries = {}
        self._blocks = set()

    def put(self, tensor, payload, checked=True):
        """Store the payload of a tensor for the layers that read it.

        Args:
            tensor (Tensor[N, *]): Tensor that the payload stands for. The
                payload of a leaf is only shared within a block
                (:meth:`in_block`): a leaf may be read in many passes, all of
                which would round alike. An exact one rounds nothing.
            payload (Payload): Its payload.
            checked (bool, optional): Whether code outside of the model's
                layers can access the tensor, so that writes to it have to be
                detected. Defaults to True.
        """
        key = id(tensor)
        if (
            tensor.grad_fn is None
            and key not in self._blocks
            and not payload.is_exact
        ):
            return
        entries = self._entries
        entries[key] = _Entry(
            # Another tensor may get the address of one that is freed.
            weakref.ref(tensor, functools.partial(entries.pop, key)),
            payload,
            tensor._version,
            (top_hooks(True), tensor.is_cuda and is_capturing()),
            checksum(tensor) if checked and tensor.is_cpu else None,
        )

    def get(self, tensor):
        """Find the payload of a tensor.

        Args:
            tensor (Tensor[*]): Input of a layer.

        Returns:
            Payload, optional: None if there is none, or the tensor was
            modified since. None, too, in a checkpointed block for a payload
            from outside, which the second forward pass of the block would not
            find, and in a CUDA graph for one that was not captured, whose
            tensor has other values in a replay.
        """
        entry = self._entries.get(id(tensor))
        if entry is None:
            return None
        context = (
            top_hooks(True),
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
        """Share the payload of a leaf within a block, as a context.

        Args:
            tensor (Tensor[N, *]): Input of the block. Its payload is dropped
                at the end of the block.
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
        """bool: Whether the model is in training mode.

        A frozen layer, which is in eval mode, cannot tell by itself. The
        layer that was last called in training mode can: in evaluation it is
        in eval mode, too.
        """
        layer = self.trained and self.trained()
        return layer is not None and layer.training

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()


# Shared by layers that no conversion has given the cache of a model.
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
