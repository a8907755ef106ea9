"""Pool of pinned host memory."""

import os
from pathlib import Path
from typing import NamedTuple

from ..codes.units import MIB

# Alignment for fast copies, in bytes, which torch uses for its blocks, too.
_ALIGNMENT = 512
# torch rounds pinned blocks up to powers of two. Smaller pieces come from
# slabs of this size, so that only the largest tensors waste memory.
_SLAB_BYTES = 64 * MIB
# Share of available memory, as other uses such as data loading need the rest.
_DEFAULT_SHARE = 0.8


class Extent(NamedTuple):
    """A piece of a slab.

    Attributes:
        slab (int): Index of the slab.
        start (int): Its first byte.
        end (int): The byte after its last.
    """

    slab: int
    start: int
    end: int


class HostPool:
    """Allocates pieces of pinned memory.

    It grows up to a limit and never shrinks: pinning blocks the host until
    the device is idle, so that a steady state must not allocate. Free
    neighbours are merged, so that any order of sizes can be served.

    Args:
        allocate (Callable): Makes a pinned uint8 tensor of a number of
            bytes.
        max_bytes (int): Limit of pinned memory.
    """

    def __init__(self, allocate, max_bytes):
        self._allocate = allocate
        self._max_bytes = max_bytes
        self._slabs = []
        # Free pieces of every slab, by address.
        self._free = []
        self.nbytes = 0
        self.used_bytes = 0

    def take(self, nbytes):
        """Reserve memory.

        Args:
            nbytes (int): Bytes.

        Returns:
            Extent: The piece, of at least that size.

        Raises:
            RuntimeError: If the limit would be exceeded, or the system cannot
                pin the memory.
        """
        nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        piece = self._best_fit(nbytes)
        if piece is None:
            self._grow(nbytes)
            piece = self._best_fit(nbytes)
        free = self._free[piece.slab]
        index = free.index(piece)
        taken = piece._replace(end=piece.start + nbytes)
        if taken == piece:
            del free[index]
        else:
            free[index] = piece._replace(start=taken.end)
        self.used_bytes += nbytes
        return taken

    def give(self, extent):
        """Release a piece.

        Args:
            extent (Extent): From :meth:`take`.
        """
        self.used_bytes -= extent.end - extent.start
        free = self._free[extent.slab]
        index = 0
        while index < len(free) and free[index].start < extent.start:
            index += 1
        if index < len(free) and free[index].start == extent.end:
            extent = extent._replace(end=free.pop(index).end)
        if index and free[index - 1].end == extent.start:
            index -= 1
            extent = extent._replace(start=free.pop(index).start)
        free.insert(index, extent)

    def view(self, extent, nbytes):
        """View the memory of a piece.

        Args:
            extent (Extent): The piece.
            nbytes (int): Bytes, from its start.

        Returns:
            Tensor[nbytes]: uint8.
        """
        return self._slabs[extent.slab].narrow(0, extent.start, nbytes)

    def _best_fit(self, nbytes):
        fits = (
            piece
            for free in self._free
            for piece in free
            if piece.end - piece.start >= nbytes
        )
        return min(fits, key=lambda p: p.end - p.start, default=None)

    def _grow(self, nbytes):
        room = self._max_bytes - self.nbytes
        least = 1 << (nbytes - 1).bit_length()
        if least > room:
            raise RuntimeError(
                f'swapping needs {_mib(least)} MiB more of pinned host '
                f'memory, of which {_mib(self.nbytes)} MiB are allocated and '
                f'{_mib(self.used_bytes)} MiB in use; the limit is '
                f'{_mib(self._max_bytes)} MiB. Raise max_host_mib if the '
                'machine has more memory, or make the batch smaller, or '
                'choose a level that keeps fewer bits'
            )
        size = max(least, _SLAB_BYTES)
        if size > room:
            size = least
        try:
            slab = self._allocate(size)
        except RuntimeError as error:
            raise RuntimeError(
                f'the system refuses to pin {_mib(size)} MiB of host memory '
                f'for swapping, beside {_mib(self.nbytes)} MiB that are '
                'pinned already. Set max_host_mib to what it can pin (see '
                '"ulimit -l" and the memory limit of the container), or make '
                'the batch smaller'
            ) from error
        self._free.append([Extent(len(self._slabs), 0, size)])
        self._slabs.append(slab)
        self.nbytes += size


def default_max_bytes():
    """Default limit of the memory that a process pins.

    Returns:
        int: Bytes; a share of the available memory, divided by the number of
        processes of the launch on this machine.
    """
    available = min(_available_bytes(), _container_bytes())
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return int(available * _DEFAULT_SHARE) // processes


def _available_bytes():
    for line in Path('/proc/meminfo').read_text().splitlines():
        if line.startswith('MemAvailable:'):
            return int(line.split()[1]) * 1024
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def _container_bytes():
    """Bytes that the control group has left; infinite without one."""
    group = Path('/sys/fs/cgroup')
    try:
        limit = int((group / 'memory.max').read_text())
        return limit - int((group / 'memory.current').read_text())
    except (OSError, ValueError):
        # Not version 2 of control groups, or no limit ('max').
        return float('inf')


def _mib(nbytes):
    return f'{nbytes / MIB:.2f}'
