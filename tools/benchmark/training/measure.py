"""Measurement of a trial in this process."""

import math
import statistics
import time

import torch

import mmactnn
from mmactnn.codes.units import MIB
from mmactnn.offload import attached_swap
from shared import output
from shared.results import OK, OUT_OF_MEMORY

from . import trace
from .models import build_task
from .systems import parse_system

_DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)

# Words of errors about memory that are not of torch's own class: those of the
# allocator of the CPU, of CUDA itself and of its libraries.
_OUT_OF_MEMORY_MESSAGES = (
    'out of memory',
    'not enough memory',
    "can't allocate memory",
    'ALLOC_FAILED',
)


class Training:
    """A model in training, by one system, on one batch.

    Args:
        trial (Trial): Settings.
    """

    def __init__(self, trial):
        self.trial = trial
        self.system = parse_system(trial.system)
        self.device = torch.device(trial.device)
        self.on_gpu = self.device.type == 'cuda'
        self.model, self.compute_loss = build_task(trial)
        self.system.prepare(self.model, trial.batch_size)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # Random images teach nothing: the rate only has to keep it finite.
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        self.dtype = _DTYPES.get(trial.precision)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16
        )

    def step(self, meter=None):
        """Train on the batch once.

        Args:
            meter (ActivationMeter, optional): Counts what is saved.

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
            loss = self.compute_loss()
        self.scaler.scale(loss).backward()
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
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def measure_speed(self):
        """Figures of the timed steps, after the warm-up."""
        for _ in range(self.trial.warmup):
            self.step()
        self.synchronize()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = statistics.median(
            self.timed_step()[1] for _ in range(self.trial.steps)
        )
        figures = dict(
            images_per_s=round(self.trial.batch_size / seconds, 2),
            ms_per_step=round(1e3 * seconds, 3),
            peak_mib=None,
        )
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            figures.update(peak_mib=_mib(peak), reserved_mib=_mib(reserved))
        return figures

    def measure_activations(self):
        """Figures of what one step keeps for the backward pass."""
        with mmactnn.measure_activations(self.model) as meter:
            loss = self.step(meter).item()
        figures = dict(
            activations_mib=_mib(meter.saved_bytes),
            on_host_mib=_mib(meter.swapped_bytes),
            loss=round(loss, 6),
            finite=math.isfinite(loss),
        )
        if self.on_gpu:
            swap = attached_swap(self.model)
            pinned = torch.cuda.host_memory_stats()['allocated_bytes.peak']
            figures.update(
                pinned_mib=_mib(swap.host_bytes if swap else pinned)
            )
        return figures


def measure(trial):
    """Measure a trial.

    Args:
        trial (Trial): Settings. Its system must be the only one that the
            process trains with.

    Returns:
        dict: ``result`` (``'ok'`` or ``'out of memory'``), figures by name
        with the unit, and the device.
    """
    device = torch.device(trial.device)
    where = dict(device_name=output.device_name(device))
    where['torch'] = torch.__version__
    limit_memory(device, trial.memory_limit_mib)
    try:
        training = Training(trial)
        figures = training.measure_speed() | training.measure_activations()
        if trial.timeline:
            events = trace.profile_steps(training, steps=1)
            samples = trace.follow_memory(events, training.on_gpu)
            figures.update(samples=samples)
        if trial.trace:
            events = trace.profile_steps(training, trial.trace)
            figures.update(trace.overlap(events))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return dict(result=OUT_OF_MEMORY, **where)
    return dict(result=OK, **figures, **where)


def limit_memory(device, limit_mib):
    """Let this process have no more MiB of the GPU, if there is a limit."""
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
    """Whether an error says that there was not enough memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        message in str(error) for message in _OUT_OF_MEMORY_MESSAGES
    )


def _mib(nbytes):
    return round(nbytes / MIB, 2)
