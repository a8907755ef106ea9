"""Speed and memory of every level, beside exact training, in one run.

Trains torchvision's ResNet-50 on random images, one process for all levels,
each measured from a fresh model after a warm-up. ``exact`` is the model as
torchvision makes it. Activations are those that autograd saves; the peak is
that of the CUDA allocator over the timed steps.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time

import torch
import torch.nn.functional as F

import mmactnn
from mmactnn.units import MIB

DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--levels',
        nargs='+',
        default=['exact', *mmactnn.LEVELS],
        help='exact, or names of levels',
    )
    parser.add_argument('--model', default='resnet50', help='of torchvision')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--amp', choices=DTYPES, help='autocast to this dtype')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--warmup', type=int, default=12, help='steps')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--out', help='write the results to this json file')
    return parser.parse_args(argv)


def measure(args, level):
    """Train some steps at a level.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.
        level (str): ``'exact'`` or the name of a level.

    Returns:
        dict: The row of the table.
    """
    import torchvision

    device = torch.device(args.device)
    torch.manual_seed(0)
    model = getattr(torchvision.models, args.model)().to(device).train()
    layout = torch.contiguous_format
    if args.channels_last:
        layout = torch.channels_last
    model = model.to(memory_format=layout)
    if level != 'exact':
        mmactnn.convert_model(model, level)
    size = (args.batch_size, 3, args.image_size, args.image_size)
    images = torch.randn(size, device=device).to(memory_format=layout)
    labels = torch.randint(1000, (args.batch_size,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')

    def step(meter=contextlib.nullcontext()):  # noqa: B008
        optimizer.zero_grad()
        with (
            meter as counted,
            torch.autocast(
                device.type, DTYPES.get(args.amp), enabled=bool(args.amp)
            ),
        ):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return counted

    def synchronize():
        if device.type == 'cuda':
            torch.cuda.synchronize(device)

    for _ in range(args.warmup):
        step()
    synchronize()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    peak = 0
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    meter = step(mmactnn.measure_activations(model))
    return dict(
        level=level,
        images_per_s=round(args.batch_size / statistics.median(seconds), 1),
        activations_mib=round(meter.saved_mib, 1),
        on_host_mib=round(meter.swapped_bytes / MIB, 1),
        peak_mib=round(peak / MIB, 1),
    )


def main():
    """Measure every level, print a json line for each."""
    args = parse_args()
    device = torch.device(args.device)
    name = 'cpu'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    rows = []
    for level in args.levels:
        row = measure(args, level)
        rows.append(row)
        print(json.dumps(row), flush=True)
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.empty_cache()
    result = dict(
        device=name, torch=torch.__version__, args=vars(args), rows=rows
    )
    if args.out:
        with open(args.out, 'w') as file:
            json.dump(result, file, indent=2)


if __name__ == '__main__':
    main()
