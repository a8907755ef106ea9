"""Stands for a GPU's copy streams where there is no GPU."""

import collections

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class LaggingTransport:
    """Copies as late as the events that are waited for allow.

    It holds no reference to what it copies: memory that is given back too
    early is an error, what is read too early is garbage.

    Args:
        device (torch.device): The device.
    """

    device_type = 'cpu'
    lagging = True

    def __init__(self, device):
        self.device = device
        self.allocated = []
        self.copied_out = []
        self.copied_in = []
        self.stream = 'default'
        self.shared = []
        self._out = collections.deque()
        self._in = collections.deque()

    def allocate_host(self, nbytes):
        self.allocated.append(nbytes)
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def current_stream(self):
        return self.stream

    def copy_out(self, source, host):
        self.copied_out.append(source.numel())
        return self._submit(self._out, source, host, self._in)

    def copy_in(self, host, copied):
        # Zeros are garbage, too, but no index that is out of bounds.
        data = torch.zeros_like(host)
        self.copied_in.append(host.numel())
        return data, self._submit(self._in, data, host, [copied])

    def wait(self, stream, event):
        event.run()
        event.waiting.add(stream)

    def is_done(self, event):
        if not self.lagging:
            event.run()
        return event.done

    def share(self, tensor, stream):
        self.shared.append((tensor, stream))

    def _submit(self, queue, device_side, host, after):
        event = _Copy(queue is self._out, device_side, host)
        event.after = [*after, *queue]
        queue.append(event)
        return event


class PromptTransport(LaggingTransport):
    """Copies whenever it is asked whether it is done."""

    lagging = False


class RefusingTransport(LaggingTransport):
    """Cannot pin memory."""

    def allocate_host(self, nbytes):
        raise RuntimeError('out of pages')


class _Copy:
    def __init__(self, is_out, device_side, host):
        self.done = False
        # Streams that have waited for it.
        self.waiting = set()
        self._is_out = is_out
        self._host = host
        self._ref = StorageWeakRef(device_side.untyped_storage())
        self._start = device_side.storage_offset()

    def run(self):
        if self.done:
            return
        self.done = True
        while self.after:
            self.after.pop(0).run()
        storage = torch.UntypedStorage._new_with_weak_ptr(self._ref.cdata)
        if storage is None:
            raise AssertionError('memory was given back during a copy')
        data = torch.empty(0, dtype=torch.uint8)
        data.set_(storage, self._start, self._host.size(), (1,))
        source, target = (
            (data, self._host) if self._is_out else (self._host, data)
        )
        target.copy_(source)
