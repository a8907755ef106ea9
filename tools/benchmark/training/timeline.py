"""Follows the memory through one training step."""

import time

import torch

from mmactnn.codes.units import MIB


class Timeline:
    """Samples of the memory as a training step goes on.

    It is read where a layer's forward pass ends and where its backward pass
    begins. On a GPU that is what the allocator has handed out, and the most
    since the sample before, so that buffers which live inside of a layer
    only are seen, too. Without one it is the resident size of the process.

    Attributes:
        samples (list[list]): Milliseconds since the start, phase of the step
            (``'forward'``, ``'backward'`` or ``'update'``), MiB now and most
            MiB since the last sample. Milliseconds are those of the host,
            which calls the allocator ahead of the computation.

    Args:
        device (torch.device): Whose memory is read.
    """

    def __init__(self, device):
        self.samples = []
        self._device = device
        self._phase = 'forward'
        self._start = time.perf_counter()
        self._reset()
        self.sample()

    def watch(self, model):
        """Sample at every layer of a model.

        Args:
            model (nn.Module): The model.

        Returns:
            list[RemovableHandle]: Hooks, to be removed after the step.
        """
        return [
            module.register_forward_hook(self._after_forward)
            for module in model.modules()
            if next(module.children(), None) is None
        ]

    def enter(self, phase):
        """Begin a phase of the step.

        Args:
            phase (str): Name of the phase.
        """
        self.sample()
        self._phase = phase

    def sample(self):
        """Read the memory."""
        now, most = self._read()
        ms = 1e3 * (time.perf_counter() - self._start)
        self.samples.append([round(ms, 3), self._phase, now, most])
        self._reset()

    def _after_forward(self, module, args, output):
        self.sample()
        # Not a backward hook of the module: its views of the output forbid
        # the activation after it to work in place.
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(self._before_backward)

    def _before_backward(self, grad):
        self.sample()

    def _read(self):
        if self._device.type == 'cuda':
            now = torch.cuda.memory_allocated(self._device)
            most = torch.cuda.max_memory_allocated(self._device)
        else:
            now = most = _resident_bytes()
        return round(now / MIB, 2), round(most / MIB, 2)

    def _reset(self):
        if self._device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self._device)


def _resident_bytes():
    with open('/proc/self/status') as file:
        for line in file:
            if line.startswith('VmRSS:'):
                return int(line.split()[1]) * 1024
    raise RuntimeError('/proc/self/status must have a line VmRSS, got none')
