"""Profile of training steps: memory, and copies during computation."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from mmactnn.codes.units import MIB


def profile_steps(training, path=None, steps=2):
    """Events of steps, times in microseconds; a path gets a chrome trace."""
    training.synchronize()
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(steps):
            training.step()
        training.synchronize()
    with tempfile.NamedTemporaryFile(suffix='.json') as file:
        path = Path(path or file.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())['traceEvents']


def follow_memory(events, on_gpu):
    """Milliseconds and MiB after each allocation and release.

    The memory is that of the GPU's allocator, or on a CPU the memory allocated
    since the profile began. The time is that of the host, which calls the
    allocator ahead of the computation.
    """
    samples = sorted(
        (event['ts'], event['args']['Total Allocated'])
        for event in events
        if event['name'] == '[memory]'
        and (event['args']['Device Type'] == 1) == on_gpu
    )
    start = samples[0][0] if samples else 0
    return [[(t - start) / 1e3, round(n / MIB, 2)] for t, n in samples]


def overlap(events):
    """Milliseconds of kernels and of copies between host and device.

    Also the share of copies during which a kernel runs.
    """
    kernels = _spans(events, 'kernel', '')
    copies = _spans(events, 'gpu_memcpy', 'HtoD', 'DtoH')
    # Each kernel counts from the end of all those before it.
    ends = np.maximum.accumulate(kernels[:, 1])
    starts = np.maximum(kernels[:, 0], np.append(-np.inf, ends)[: len(ends)])
    both = sum(
        (np.minimum(ends, end) - np.maximum(starts, start)).clip(0).sum()
        for start, end in copies
    )
    total = np.diff(copies).sum()
    return dict(
        copy_ms=round(total / 1e3, 3),
        kernel_ms=round((ends - starts).sum() / 1e3, 3),
        overlapped=round(both / total, 4) if total else None,
    )


def _spans(events, category, *names):
    """Start and end of events that have one of the names, in order."""
    spans = [
        (event['ts'], event['ts'] + event['dur'])
        for event in events
        if event.get('cat') == category
        and any(name in event['name'] for name in names)
    ]
    return np.array(sorted(spans), float).reshape(-1, 2)
