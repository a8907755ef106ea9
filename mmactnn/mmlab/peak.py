"""Peak memory of training steps, separate from the warm-up."""

import resource

import torch

# Steps of the warm-up. cuDNN tries out algorithms, libraries allocate
# workspaces, and the optimizer makes its state. In the first two steps, which
# report to adaptive precision, blocks run layer by layer.
_WARMUP_STEPS = 3


class PeakMemory:
    """Largest memory of a GPU in training steps.

    The first steps are not representative: with ``cudnn_benchmark=True`` the
    workspaces of all algorithms that cuDNN tries out may exceed the memory of
    a step many times, also later with each new size of the images. Their peak
    is recorded separately. The GPU's counter is reset after them, so that
    they are not part of ``memory`` of ``LoggerHook``, which resets the
    counter as well. Otherwise the counter is only read.

    Without a GPU the peak is the largest resident size of the process.

    Args:
        cuda (module, optional): Replaced by tests. Defaults to
            ``torch.cuda``.

    Attributes:
        peak_bytes (int, optional): Peak of the steps after the warm-up; None
            if there were none.
        warmup_bytes (int, optional): Peak up to the end of the warm-up and of
            later steps that warm up; None without a GPU.
    """

    def __init__(self, cuda=torch.cuda):
        self.peak_bytes = self.warmup_bytes = None
        self._cuda = cuda
        self._steps_left = _WARMUP_STEPS
        self._sizes = set()
        self._warms_up = True

    def begin_step(self, batch):
        """Register the start of a step.

        Args:
            batch (object): Batch of the step.
        """
        if not self._cuda.is_available():
            return
        is_new = False
        if torch.backends.cudnn.benchmark:
            size = _size(batch)
            is_new = size not in self._sizes
            self._sizes.add(size)
        self._warms_up = self._steps_left > 0 or is_new
        if self._warms_up and self._steps_left <= 0:
            # Excludes work since the last step, such as a validation.
            self._take('peak_bytes')
            self._cuda.reset_peak_memory_stats()

    def end_step(self):
        """Register the end of a step, before others reset the counter."""
        if not self._cuda.is_available():
            # Linux counts in KiB.
            usage = resource.getrusage(resource.RUSAGE_SELF)
            self.peak_bytes = usage.ru_maxrss * 1024
            return
        if not self._warms_up:
            self._take('peak_bytes')
            return
        self._take('warmup_bytes')
        self._steps_left -= 1
        if self._steps_left <= 0:
            self._cuda.reset_peak_memory_stats()

    def _take(self, name):
        peak = max(getattr(self, name) or 0, self._cuda.max_memory_allocated())
        setattr(self, name, peak)


def _size(batch):
    """Size of a batch: the number of its tensors, and the largest extents.

    Images of a list are padded to these.
    """
    shapes = [tuple(tensor.shape) for tensor in _tensors(batch)]
    rank = max(map(len, shapes), default=0)
    largest = [shape for shape in shapes if len(shape) == rank]
    return len(shapes), tuple(map(max, zip(*largest)))


def _tensors(batch):
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)
