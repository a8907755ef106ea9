"""Engine of swapping: choice of tensors, and order of their return."""

import collections
import contextlib
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import record_function
from torch.multiprocessing.reductions import StorageWeakRef

from .host_pool import HostPool

# Share of a storage below which a view is swapped by itself. A larger view
# swaps the whole storage, as other views of it are likely saved, too.
_SMALL_VIEW = 0.25
# Alignment in bytes that addresses of a partial copy keep, since the choice of
# kernels depends on it.
_ALIGNMENT = 512


class SwapEngine:
    """Pack and unpack hooks that keep tensors on the host.

    Copies run on streams of their own, and the host never waits for memory:
    tensors that a copy reads or writes are kept alive until a stream has
    waited for that copy. Such memory is limited to a window in each
    direction; beyond it the computation waits for the copies.

    Args:
        transport (CudaTransport): Does the copying.
        min_bytes (int): Storages that are smaller stay on the device.
        max_host_bytes (int): Most host memory to pin.
        window_bytes (int): Most device memory for copies under way, for each
            direction.
    """

    def __init__(self, transport, min_bytes, max_host_bytes, window_bytes):
        self.device = transport.device
        self.pool = HostPool(transport.allocate_host, max_host_bytes)
        self.observer = None
        self._transport = transport
        self._min_bytes = min_bytes
        self._window_bytes = window_bytes
        self._own = frozenset()
        self._pass = _Pass()
        # Keys are storage and version, as the content of a payload is fixed.
        self._payloads = weakref.WeakValueDictionary()
        self._leaving = _InFlight(transport)
        self._arriving = _InFlight(transport)
        self._ahead = []
        # Freed extents. Backward passes free payloads in threads of their own,
        # the garbage collector in any.
        self._returned = collections.deque()
        self._lock = threading.RLock()

    @property
    def pass_bytes(self):
        """int: Bytes swapped out since :meth:`begin_pass`."""
        return self._pass.nbytes

    @property
    def window_bytes(self):
        """int: Device memory that copies hold at the moment."""
        return self._leaving.nbytes + self._arriving.nbytes

    def begin_pass(self, own):
        """Start a forward pass.

        Args:
            own (Iterable[Tensor]): Parameters and buffers; they stay.
        """
        with self._lock:
            self._own = frozenset(
                tensor.untyped_storage()._cdata for tensor in own
            )
            self._pass = _Pass()
            self._settle()

    def settle(self):
        """Release the memory of all copies, in the order of streams."""
        with self._lock:
            self._settle()
            self._leaving.release_beyond(0)
            self._arriving.release_beyond(0)

    @property
    def meter(self):
        """ActivationMeter, optional: See ``codes.hooks.meter_in_force``."""
        return getattr(self.observer, '__self__', None)

    def pack(self, tensor):
        """Hook for every tensor that autograd saves.

        Args:
            tensor (Tensor): The tensor.

        Returns:
            object: Placeholder, for :meth:`unpack`.

        Raises:
            RuntimeError: If there is not enough host memory.
        """
        swapped = self._is_swapped(tensor)
        if self.observer is not None:
            self.observer(tensor, swapped)
        if not swapped:
            return _Kept(tensor)
        with self._lock, _range('mmactnn: swap out'):
            self._settle()
            return self._pass.append(tensor, self._payload(tensor))

    # See mmactnn.codes.hooks.
    pack.keeps_tensors = True

    def unpack(self, packed):
        """Hook for every tensor that a backward pass needs.

        Args:
            packed (object): From :meth:`pack`.

        Returns:
            Tensor: The tensor.

        Raises:
            RuntimeError: If it was modified after it was saved.
        """
        packed.version.check()
        if isinstance(packed, _Kept):
            return packed.tensor
        with self._lock, _range('mmactnn: swap in'):
            self._settle()
            storage = self._bring(packed.payload)
            tensor = packed.view(storage, self.device)
            self._hand_over(tensor, packed.payload.place)
            self._fetch_ahead(packed)
            return tensor

    def _is_swapped(self, tensor):
        if (
            tensor.device != self.device
            or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
            # Lazy conjugation or negation is not part of the bytes.
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return False
        storage = tensor.untyped_storage()
        # By size of the storage, all of which a view keeps.
        return (
            storage.nbytes() >= max(self._min_bytes, 1)
            and storage._cdata not in self._own
        )

    def _payload(self, tensor):
        storage = tensor.untyped_storage()
        start, end = _byte_range(tensor, storage.nbytes())
        key = storage._cdata, tensor._version
        payload = self._payloads.get(key)
        if payload is None or not payload.covers(start, end):
            payload = self._swap_out(storage, start, end)
            self._payloads[key] = payload
        return payload

    def _swap_out(self, storage, start, end):
        nbytes = end - start
        extent = self.pool.take(nbytes)
        source = torch.empty(0, dtype=torch.uint8, device=self.device)
        source.set_(storage, start, (nbytes,), (1,))
        copied = self._transport.copy_out(
            source, self.pool.view(extent, nbytes)
        )
        self._leaving.add(source, copied)
        self._leaving.release_beyond(self._window_bytes)
        self._pass.nbytes += nbytes
        return _Payload(storage, start, end, extent, copied, self._returned)

    def _bring(self, payload):
        """Storage of the payload on the device; a copy may still fill it."""
        # The original storage may still be alive, kept by a running copy, the
        # caller of the model or an earlier unpack.
        storage = payload.place.storage()
        if storage is not None:
            return storage
        data, arrived = self._transport.copy_in(
            self.pool.view(payload.extent, payload.nbytes), payload.copied
        )
        number = self._arriving.add(data, arrived)
        storage = data.untyped_storage()
        payload.place = _Place(
            StorageWeakRef(storage),
            payload.start,
            arrived,
            number,
            self._transport.current_stream(),
        )
        return storage

    def _hand_over(self, tensor, place):
        """Make a tensor ready for the current stream."""
        if place.arrived is None:
            return
        current = self._transport.current_stream()
        self._transport.wait(current, place.arrived)
        self._arriving.release_through(place.number, current)
        if place.stream != current:
            self._transport.share(tensor, current)

    def _fetch_ahead(self, packed):
        """Fetch payloads that are needed next: a window of earlier ones."""
        room = self._window_bytes
        wanted = set()
        for payload in packed.earlier_payloads():
            if payload in wanted:
                continue
            # At least one, or tensors larger than a window would never overlap
            # with computation.
            if wanted and payload.nbytes > room:
                break
            room -= payload.nbytes
            wanted.add(payload)
            payload.held = self._bring(payload)
        for ref in self._ahead:
            payload = ref()
            if payload is not None and payload not in wanted:
                payload.held = None
        self._ahead = [weakref.ref(payload) for payload in wanted]

    def _settle(self):
        while self._returned:
            self.pool.give(self._returned.popleft())
        self._leaving.release_done()
        self._arriving.release_done()


class _Version:
    """Check that a tensor was not modified after it was saved.

    Autograd leaves that check to the hooks.
    """

    def __init__(self, tensor, alias):
        self._saved = tensor._version
        self._alias = alias
        self._size = tensor.size()

    def check(self):
        # Aliases share a version counter.
        current = self._alias._version
        if current != self._saved:
            raise RuntimeError(
                'one of the variables needed for gradient computation has '
                'been modified by an inplace operation: '
                f'[{self._alias.type()} {list(self._size)}] is at version '
                f'{current}; expected version {self._saved} instead'
            )


class _Kept:
    """Saved tensor that stays on the device."""

    def __init__(self, tensor):
        # Detached: an output that its own node saves would own that node, and
        # without a backward pass neither would be freed.
        self.tensor = tensor.detach()
        self.version = _Version(tensor, self.tensor)


class _Pass:
    """Payloads that one forward pass swaps out, in order."""

    def __init__(self):
        self.refs = []
        self.nbytes = 0

    def append(self, tensor, payload):
        swapped = _Swapped(tensor, payload, self, len(self.refs))
        self.refs.append(weakref.ref(swapped))
        return swapped


class _Swapped:
    """Saved tensor whose bytes are in a payload."""

    def __init__(self, tensor, payload, owner, position):
        self.payload = payload
        # An alias without memory.
        alias = tensor.detach()
        alias.data = alias.new_empty(0)
        self.version = _Version(tensor, alias)
        self._pass = owner
        self._position = position
        self._dtype = tensor.dtype
        self._size, self._stride = tensor.size(), tensor.stride()
        self._offset = tensor.storage_offset()

    def view(self, storage, device):
        """The tensor, as a view of its storage's copy."""
        shift = self.payload.place.start // self._dtype.itemsize
        return torch.empty(0, dtype=self._dtype, device=device).set_(
            storage, self._offset - shift, self._size, self._stride
        )

    def earlier_payloads(self):
        """Payloads that were saved before, the last one first."""
        for i in range(self._position - 1, -1, -1):
            other = self._pass.refs[i]()
            if other is not None:
                yield other.payload


class _Payload:
    """Bytes of a storage on the host, for all tensors that share them."""

    def __init__(self, storage, start, end, extent, copied, returned):
        # Weak, but prevents that a new storage gets the same identity.
        self._origin = StorageWeakRef(storage)
        self.start, self._end = start, end
        self.extent = extent
        self.copied = copied
        self._returned = returned
        self.place = _Place(self._origin, 0, None, None, None)
        # Storage on the device, while it is prefetched.
        self.held = None

    def __del__(self):
        self._returned.append(self.extent)

    @property
    def nbytes(self):
        return self._end - self.start

    def covers(self, start, end):
        return self.start <= start and end <= self._end


class _Place(NamedTuple):
    """Location of a payload on the device, while its storage is alive.

    Attributes:
        ref (StorageWeakRef): The storage.
        start (int): Byte of the original storage that it starts with.
        arrived (object, optional): Event of the copy's end; None for the
            original storage.
        number (int, optional): Number of the copy.
        stream (object, optional): Stream that owns the memory.
    """

    ref: StorageWeakRef
    start: int
    arrived: Any
    number: int | None
    stream: Any

    def storage(self):
        return torch.UntypedStorage._new_with_weak_ptr(self.ref.cdata)


class _Copy(NamedTuple):
    number: int
    tensor: torch.Tensor
    event: Any
    stream: Any

    @property
    def nbytes(self):
        return self.tensor.untyped_storage().nbytes()


class _InFlight:
    """Tensors that copies in one direction still use, oldest first.

    The memory of a tensor returns to the stream that was current when the
    tensor was added, once that stream has waited for the copy, or the copy is
    done.
    """

    def __init__(self, transport):
        self._transport = transport
        self._copies = collections.deque()
        self._count = 0
        self.nbytes = 0

    def add(self, tensor, event):
        self._count += 1
        copy = _Copy(
            self._count, tensor, event, self._transport.current_stream()
        )
        self._copies.append(copy)
        self.nbytes += copy.nbytes
        return copy.number

    def release_done(self):
        """Release tensors of copies that are done."""
        while self._copies and self._transport.is_done(self._copies[0].event):
            self._pop()

    def release_beyond(self, nbytes):
        """Make streams wait until at most ``nbytes`` are left."""
        while self._copies and self.nbytes > nbytes:
            copy = self._pop()
            self._transport.wait(copy.stream, copy.event)

    def release_through(self, number, waited):
        """Release tensors up to a copy that a stream has waited for."""
        while self._copies and self._copies[0].number <= number:
            copy = self._pop()
            # Copies in one direction finish in order.
            if copy.stream != waited:
                self._transport.wait(copy.stream, copy.event)

    def __del__(self):
        self.release_beyond(0)

    def _pop(self):
        copy = self._copies.popleft()
        self.nbytes -= copy.nbytes
        return copy


def _range(name):
    """Range in a profiler's trace; free of cost without a profiler."""
    if torch.autograd._profiler_enabled():
        return record_function(name)
    return contextlib.nullcontext()


def _byte_range(tensor, storage_bytes):
    """Part of a storage to copy for one of its tensors."""
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    span = sum(
        (n - 1) * stride for n, stride in zip(tensor.size(), tensor.stride())
    )
    end = start + (span + 1) * size if tensor.numel() else start
    if end - start >= _SMALL_VIEW * storage_bytes:
        return 0, storage_bytes
    start -= start % _ALIGNMENT
    return start, max(end, start + 1)
