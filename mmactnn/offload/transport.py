"""Asynchronous copies between a GPU and pinned host memory."""

import torch


class CudaTransport:
    """Streams, events and pinned memory of one GPU.

    Only :meth:`allocate_host` blocks the host. Everything else is ordered on
    the device: each of the two copy streams waits for the data that it reads
    and for readers of the memory that it overwrites.

    Args:
        device (torch.device): The GPU.
    """

    device_type = 'cuda'

    def __init__(self, device):
        self.device = device
        # A stream for each direction, so that both can be busy.
        self._out = torch.cuda.Stream(device)
        self._in = torch.cuda.Stream(device)

    def allocate_host(self, nbytes):
        """Pin host memory.

        Args:
            nbytes (int): Bytes.

        Returns:
            Tensor[nbytes]: uint8.
        """
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def current_stream(self):
        """torch.cuda.Stream: The stream that computes."""
        return torch.cuda.current_stream(self.device)

    def copy_out(self, source, host):
        """Start to copy to the host.

        The caller keeps ``source`` alive until the event has passed, as seen
        from the stream that its memory goes back to.

        Args:
            source (Tensor[N]): uint8 on the device.
            host (Tensor[N]): uint8, pinned.

        Returns:
            torch.cuda.Event: Passes when the copy is done.
        """
        self._out.wait_stream(self.current_stream())
        # An earlier fetch may still read the memory that is overwritten.
        self._out.wait_stream(self._in)
        with torch.cuda.stream(self._out):
            host.copy_(source, non_blocking=True)
        return self._out.record_event()

    def copy_in(self, host, copied):
        """Start to copy to the device.

        The caller keeps the tensor alive until the event has passed, as seen
        from the current stream, and waits for it before using the tensor.

        Args:
            host (Tensor[N]): uint8, pinned.
            copied (torch.cuda.Event): From :meth:`copy_out`.

        Returns:
            tuple[Tensor[N], torch.cuda.Event]: uint8 on the device, and the
            event of the copy's end.
        """
        # Allocated on the stream that uses it, where its memory may have
        # belonged to a kernel that still runs.
        data = torch.empty(host.numel(), dtype=torch.uint8, device=self.device)
        self._in.wait_stream(self.current_stream())
        self._in.wait_event(copied)
        with torch.cuda.stream(self._in):
            data.copy_(host, non_blocking=True)
        return data, self._in.record_event()

    def wait(self, stream, event):
        """Make a stream wait.

        Args:
            stream (torch.cuda.Stream): From :meth:`current_stream`.
            event (torch.cuda.Event): Event to wait for.
        """
        stream.wait_event(event)

    def is_done(self, event):
        """bool: Whether an event has passed; does not wait for it."""
        return event.query()

    def share(self, tensor, stream):
        """Tell the allocator that a tensor is used on another stream.

        Args:
            tensor (Tensor): The tensor.
            stream (torch.cuda.Stream): The stream.
        """
        tensor.record_stream(stream)
