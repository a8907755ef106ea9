"""Measurement of a trial in this process."""

import math
import re
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

# Words in errors about memory that have another class than torch's own: from
# the CPU's allocator, CUDA and its libraries.
_OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED"
)


class Training:
    """A model in training, by one system, on one batch of a trial."""

    def __init__(self, trial):
        self.trial = trial
        self.system = parse_system(trial.system)
        self.device = torch.device(trial.device)
        self.on_gpu = self.device.type == 'cuda'
        self.model, self.compute_loss = build_task(trial)
        self.system.prepare(self.model, trial.batch_size)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # Images are random: the rate only has to keep the loss finite.
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
        self.dtype = _DTYPES.get(trial.precision)
        scales = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales)

    def step(self, meter=None):
        """Loss of a step, during which a meter counts saved tensors."""
        self.optimizer.zero_grad()
        batch_size, amp = self.trial.batch_size, self.dtype is not None
        with (
            self.system.forward_context(self.model, batch_size, meter),
            torch.autocast(self.device.type, self.dtype, enabled=amp),
        ):
            loss = self.compute_loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def timed_step(self):
        """Seconds until a step has returned, and until it is done."""
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
        steps = range(self.trial.steps)
        seconds = statistics.median(self.timed_step()[1] for _ in steps)
        peak = reserved = None
        if self.on_gpu:
            peak = _mib(torch.cuda.max_memory_allocated(self.device))
            reserved = _mib(torch.cuda.max_memory_reserved(self.device))
        return dict(
            images_per_s=round(self.trial.batch_size / seconds, 2),
            ms_per_step=round(1e3 * seconds, 3),
            peak_mib=peak,
            reserved_mib=reserved,
        )

    def measure_activations(self):
        """Figures of the memory that one step keeps for the backward pass."""
        with mmactnn.measure_activations(self.model) as meter:
            loss = self.step(meter).item()
        pinned, swap = 0, attached_swap(self.model)
        if swap is not None:
            pinned = swap.host_bytes
        elif self.on_gpu:
            pinned = torch.cuda.host_memory_stats()['allocated_bytes.peak']
        return dict(
            activations_mib=_mib(meter.saved_bytes),
            on_host_mib=_mib(meter.swapped_bytes),
            pinned_mib=_mib(pinned),
            loss=round(loss, 6),
            finite=math.isfinite(loss),
        )


def measure(trial):
    """Result of a trial, figures by name with the unit, and the device.

    Its system must be the only one that the process trains with.
    """
    device = torch.device(trial.device)
    where = output.describe_device(device)
    limit_memory(device, trial.memory_limit_mib)
    try:
        training = Training(trial)
        figures = training.measure_speed() | training.measure_activations()
        if trial.timeline:
            events = trace.profile_steps(training, steps=1)
            figures['samples'] = trace.follow_memory(events, training.on_gpu)
        if trial.trace:
            events = trace.profile_steps(training, trial.trace)
            figures.update(trace.overlap(events))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return dict(result=OUT_OF_MEMORY, **where)
    return dict(result=OK, **figures, **where)


def limit_memory(device, limit_mib):
    """Limit the GPU memory of this process, if ``limit_mib`` is given."""
    if limit_mib is None:
        return
    if device.type != 'cuda':
        raise ValueError(
            f'a memory limit needs the CUDA allocator, got device {device}'
        )
    total = torch.cuda.get_device_properties(device).total_memory
    share = min(1.0, limit_mib * MIB / total)
    # Some versions of torch need a device with an index.
    torch.cuda.set_per_process_memory_fraction(share, device.index or 0)


def is_out_of_memory(error):
    """Whether an error says that there was not enough memory."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or _OUT_OF_MEMORY.search(str(error)) is not None


def _mib(nbytes):
    return round(nbytes / MIB, 2)
