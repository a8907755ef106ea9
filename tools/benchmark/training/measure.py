"""Measures a trial in this process."""

import contextlib
import math
import statistics
import time

import torch

import mmactnn
from mmactnn.codes.units import MIB

from .models import build_task
from .systems import parse_system
from .timeline import Timeline
from .trial import OK, OUT_OF_MEMORY

_DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)

# What is said of memory by errors that are not of torch's own class: the
# allocator of the CPU, CUDA itself and its libraries.
_OUT_OF_MEMORY_MESSAGES = (
    'out of memory',
    'not enough memory',
    "can't allocate memory",
    'ALLOC_FAILED',
)


def measure(trial):
    """Measure a trial.

    Args:
        trial (Trial): What is measured. Its system must be the only one that
            the process trains with.

    Returns:
        dict: ``result`` (``'ok'`` or ``'out of memory'``), what was measured
        by name with the unit (None where there is nothing), and where.
    """
    device = torch.device(trial.device)
    where = dict(device_name=_device_name(device), torch=torch.__version__)
    limit_memory(device, trial.memory_limit_mib)
    try:
        figures = _measure(trial, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return dict(result=OUT_OF_MEMORY, **where)
    return dict(result=OK, **figures, **where)


def limit_memory(device, limit_mib):
    """Let this process have no more of the GPU's memory.

    Args:
        device (torch.device): The device.
        limit_mib (float, optional): Most MiB; None is no limit.

    Raises:
        ValueError: If there is a limit, but no GPU.
    """
    if limit_mib is None:
        return
    if device.type != 'cuda':
        raise ValueError(
            f'a memory limit needs the CUDA allocator, got device {device}'
        )
    total = torch.cuda.get_device_properties(device).total_memory
    with torch.cuda.device(device):
        # Some versions of torch take no device without an index.
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, limit_mib * MIB / total)
        )


def is_out_of_memory(error):
    """Whether an error says that there was not enough memory.

    Args:
        error (Exception): The error.

    Returns:
        bool: Whether it does.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        message in str(error) for message in _OUT_OF_MEMORY_MESSAGES
    )


class Training:
    """A model in training, by one system, on one batch.

    Args:
        trial (Trial): What is measured.
    """

    def __init__(self, trial):
        self.trial = trial
        self.system = parse_system(trial.system)
        self.device = torch.device(trial.device)
        self.task = build_task(trial)
        self.model = self.task.model
        self.system.prepare(self.model, trial.batch_size)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # Random images teach nothing: the rate only has to keep it finite.
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        self.dtype = _DTYPES.get(trial.precision)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16
        )

    def step(self, meter=None, timeline=None):
        """Train on the batch once.

        Args:
            meter (ActivationMeter, optional): Counts what is saved.
            timeline (Timeline, optional): Told of the phases.

        Returns:
            Tensor: The loss.
        """
        self.optimizer.zero_grad()
        context = self.system.forward_context(
            self.model, self.trial.batch_size, meter
        )
        autocast = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype is not None
        )
        with context, autocast:
            loss = self.task.compute_loss()
        if timeline is not None:
            timeline.enter('backward')
        self.scaler.scale(loss).backward()
        if timeline is not None:
            timeline.enter('update')
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def timed_step(self):
        """Train on the batch once.

        Returns:
            tuple[float, float]: Seconds until the call has returned, and
            until the device has done it.
        """
        self.synchronize()
        start = time.perf_counter()
        self.step()
        called = time.perf_counter()
        self.synchronize()
        return called - start, time.perf_counter() - start

    def synchronize(self):
        """Wait for the device."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def count_activations(self):
        """Train on the batch once, and count what is kept for backward.

        Returns:
            tuple[ActivationMeter, Tensor]: The count, and the loss.
        """
        with mmactnn.measure_activations(self.model) as meter:
            loss = self.step(meter)
        return meter, loss

    def follow_memory(self):
        """Train on the batch once, and follow the memory.

        Returns:
            list[list]: See :class:`training.timeline.Timeline`.
        """
        self.synchronize()
        timeline = Timeline(self.device)
        with contextlib.ExitStack() as hooks:
            # Hooks inside of a compiled model would break it up.
            if self.system.kind != 'compile':
                for hook in timeline.watch(self.model):
                    hooks.callback(hook.remove)
            self.step(timeline=timeline)
        timeline.sample()
        return timeline.samples


def _measure(trial, device):
    training = Training(trial)
    for _ in range(trial.warmup):
        training.step()
    training.synchronize()
    on_gpu = device.type == 'cuda'
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(
        training.timed_step()[1] for _ in range(trial.steps)
    )
    peak = reserved = None
    if on_gpu:
        peak = _mib(torch.cuda.max_memory_allocated(device))
        reserved = _mib(torch.cuda.max_memory_reserved(device))
    meter, loss = training.count_activations()
    loss = loss.item()
    figures = dict(
        images_per_s=round(trial.batch_size / seconds, 2),
        ms_per_step=round(1e3 * seconds, 3),
        activations_mib=_mib(meter.saved_bytes),
        on_host_mib=_mib(meter.swapped_bytes),
        peak_mib=peak,
        reserved_mib=reserved,
        finite=math.isfinite(loss),
    )
    if trial.timeline:
        figures.update(samples=training.follow_memory())
    return figures


def _mib(nbytes):
    return round(nbytes / MIB, 2)


def _device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return device.type
