"""Measure training that keeps its activations in host memory.

    python tools/benchmark/swap.py [--memory-limit MIB] [--trace FILE]

A ResNet-50 is trained on random images: exactly, under torch's own
``save_on_cpu(pin_memory=True)`` and under ``HostSwap``, each in a process of
its own. With a limit of GPU memory the ones that do not fit say so. With a
trace, ``HostSwap`` is profiled as well, and it is told for which share of the
time that copies take a kernel runs, too. MiB = 2^20 bytes.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.autograd.graph import save_on_cpu

from mmactnn.codes.units import MIB
from mmactnn.offload import HostSwap

MODES = ('exact', 'save_on_cpu', 'HostSwap')


def build_model():
    """A ResNet-50 classifier, of torchvision or else of MMDetection.

    Returns:
        nn.Module: The model.
    """
    try:
        from torchvision.models import resnet50
    except ImportError:
        from mmdet.models.backbones import ResNet

        return nn.Sequential(
            ResNet(50, out_indices=(3,), norm_eval=False), Head()
        )
    return resnet50()


class Head(nn.Module):
    """Class scores from the last stage of a backbone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2048, 1000)

    def forward(self, stages):
        """Pool and classify.

        Args:
            stages (tuple[Tensor[N, 2048, H, W]]): The last one counts.

        Returns:
            Tensor[N, 1000]: Scores.
        """
        return self.linear(stages[-1].mean((2, 3)))


class Training:
    """A model, its optimizer and one batch, on the GPU.

    Args:
        mode (str): One of ``MODES``.
        args (argparse.Namespace): Settings of the command line.
    """

    def __init__(self, mode, args):
        torch.manual_seed(0)
        self.model = build_model().cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        size = args.batch_size, 3, args.image_size, args.image_size
        self.images = torch.randn(size, device='cuda')
        self.labels = torch.randint(1000, (args.batch_size,), device='cuda')
        self.amp = args.amp
        self.on_cpu = mode == 'save_on_cpu'
        self.swap = None
        if mode == 'HostSwap':
            self.swap = HostSwap(
                self.model,
                max_host_mib=args.max_host,
                window_mib=args.window,
            ).attach()

    def step(self):
        """Train on the batch once.

        Returns:
            Tensor: The loss.
        """
        on_cpu = contextlib.nullcontext()
        if self.on_cpu:
            on_cpu = save_on_cpu(pin_memory=True)
        amp = torch.autocast('cuda', torch.bfloat16, enabled=self.amp)
        with on_cpu, amp:
            scores = self.model(self.images)
            loss = nn.functional.cross_entropy(scores, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def host_bytes(self):
        """Most pinned host memory so far.

        Returns:
            int: Bytes.
        """
        if self.swap is not None:
            return self.swap.host_bytes
        return torch.cuda.host_memory_stats()['allocated_bytes.peak']


def measure(mode, args):
    """Train for some steps and measure.

    Args:
        mode (str): One of ``MODES``.
        args (argparse.Namespace): Settings of the command line.

    Returns:
        dict: One row of the result.
    """
    limit_memory(args)
    row = dict(mode=mode, img_s=None, peak_mib=None, host_mib=None)
    try:
        training = Training(mode, args)
        losses = [training.step() for _ in range(args.warmup)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses += [training.step() for _ in range(args.steps)]
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return row | dict(result='out of memory')
    return row | dict(
        img_s=round(args.steps * args.batch_size / seconds, 1),
        peak_mib=round(torch.cuda.max_memory_allocated() / MIB, 1),
        host_mib=round(training.host_bytes() / MIB, 1),
        result=f'loss {losses[-1].item():.6f}',
    )


def trace(args):
    """Profile two steps under ``HostSwap`` and write the trace.

    Args:
        args (argparse.Namespace): Settings of the command line.

    Returns:
        dict: See :func:`overlap`.
    """
    limit_memory(args)
    training = Training('HostSwap', args)
    for _ in range(args.warmup):
        training.step()
    torch.cuda.synchronize()
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=(activities.CPU, activities.CUDA)
    ) as profile:
        for _ in range(2):
            training.step()
        torch.cuda.synchronize()
    profile.export_chrome_trace(args.trace)
    with open(args.trace) as file:
        return overlap(json.load(file)['traceEvents'])


def overlap(events):
    """How much of the copies lies beside computation.

    Args:
        events (list[dict]): Events of a chrome trace, times in microseconds.

    Returns:
        dict: Milliseconds of copies between host and device, of kernels, and
        the share of the former while one of the latter runs.
    """
    spans = dict(kernel=[], gpu_memcpy=[])
    for event in events:
        category = event.get('cat')
        if category == 'gpu_memcpy' and not (
            'HtoD' in event['name'] or 'DtoH' in event['name']
        ):
            continue
        if category in spans:
            spans[category].append((event['ts'], event['ts'] + event['dur']))
    kernels = union(spans['kernel'])
    copies = sum(end - start for start, end in spans['gpu_memcpy'])
    both = sum(
        max(0, min(end, last) - max(start, first))
        for start, end in spans['gpu_memcpy']
        for first, last in kernels
    )
    return dict(
        copy_ms=round(copies / 1e3, 3),
        kernel_ms=round(sum(e - s for s, e in kernels) / 1e3, 3),
        overlapped=round(both / copies, 4) if copies else None,
    )


def union(spans):
    """Spans that cover the same time and do not overlap.

    Args:
        spans (list[tuple[float, float]]): Start and end of each.

    Returns:
        list[tuple[float, float]]: The same, in order.
    """
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def limit_memory(args):
    """Let this process have no more than ``--memory-limit``.

    Args:
        args (argparse.Namespace): Settings of the command line.
    """
    if args.memory_limit is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, args.memory_limit * MIB / total)
        )


def in_new_process(function, *args):
    """Call a function where the GPU's memory is untouched.

    Args:
        function (Callable): What is called.
        *args (Any): Its arguments.

    Returns:
        Any: What it returns.
    """
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context('spawn')
    ) as executor:
        return executor.submit(function, *args).result()


def parse_args(argv=None):
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.

    Returns:
        argparse.Namespace: Settings.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--modes', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--warmup', type=int, default=3, help='steps')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--amp', action='store_true', help='bfloat16')
    parser.add_argument(
        '--window', type=float, default=512, help="HostSwap's, in MiB"
    )
    parser.add_argument(
        '--max-host', type=float, help="HostSwap's limit, in MiB"
    )
    parser.add_argument(
        '--memory-limit', type=float, help='GPU memory of a process, in MiB'
    )
    parser.add_argument('--trace', help='file for a chrome trace')
    parser.add_argument('--out', help='json file for the rows')
    return parser.parse_args(argv)


def main():
    """Measure and print a table."""
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit('no GPU: there is nothing to measure')
    rows = [in_new_process(measure, mode, args) for mode in args.modes]
    device = torch.cuda.get_device_name()
    table = Table(title=f'{device}, torch {torch.__version__}')
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=100).print(table)
    result = dict(
        device=device, torch=torch.__version__, args=vars(args), rows=rows
    )
    if args.trace:
        result['trace'] = in_new_process(trace, args)
        print(json.dumps(result['trace']))
    if args.out:
        with open(args.out, 'w') as file:
            json.dump(result, file, indent=1)


if __name__ == '__main__':
    main()
