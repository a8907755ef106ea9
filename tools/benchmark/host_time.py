"""Time of training steps, and of the host's part, of systems by turns.

    python tools/benchmark/host_time.py --batch-size 2 --image-size 800 1344 \
        --model mmdet::retinanet/retinanet_r50_fpn_1x_coco.py

Models in training by several systems live side by side in one process and take
turns, so that what disturbs the machine disturbs all of them. For where steps
are short, or the GPU waits for the host.

step   median milliseconds from calling a step until the device has done it
25 %   of the steps take no longer than this, and
75 %   no longer than this
host   median milliseconds until the call returns; a model that waits for
       results of the device itself has its waiting in here
ratio  step over that of the first system

No two systems can run here that change the whole process, such as levels that
want settings of the allocator.
"""

import argparse
import json
import statistics

import torch
from rich.console import Console
from rich.table import Table

from training.measure import Training
from training.trial import Trial


def parse_args(argv=None):
    """Read the command line.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.

    Returns:
        argparse.Namespace: Settings.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--model',
        default='resnet50',
        help='classifier of torchvision, or config; see train.py',
    )
    parser.add_argument(
        '--systems', nargs='+', default=['exact', 'L3'], help='see train.py'
    )
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument(
        '--image-size',
        nargs=2,
        type=int,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the config',
    )
    parser.add_argument('--device', default='cuda')
    parser.add_argument(
        '--warmup', type=int, default=8, help='steps of each system'
    )
    parser.add_argument('--turns', type=int, default=4)
    parser.add_argument('--steps', type=int, default=6, help='of a turn')
    parser.add_argument('--out', help='json file for the rows')
    args = parser.parse_args(argv)
    for name in ('batch_size', 'turns', 'steps'):
        if getattr(args, name) < 1:
            parser.error(
                f'{name} must be 1 or more, got {getattr(args, name)}'
            )
    return args


def measure(args):
    """Let the systems take turns.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        list[dict]: A row for each system.
    """
    trainings = {
        system: Training(
            Trial(
                model=args.model,
                system=system,
                batch_size=args.batch_size,
                image_size=tuple(args.image_size),
                cfg_options=tuple(args.cfg_options),
                device=args.device,
            )
        )
        for system in args.systems
    }
    for training in trainings.values():
        for _ in range(args.warmup):
            training.step()
    times = {system: [] for system in trainings}
    for _ in range(args.turns):
        for system, training in trainings.items():
            # What the others have left in caches counts for none.
            training.step()
            times[system] += [training.timed_step() for _ in range(args.steps)]
    rows = []
    for system, pairs in times.items():
        host, step = ([t * 1e3 for t in part] for part in zip(*pairs))
        low, median, high = quartiles(step)
        rows.append(
            {
                'system': system,
                'step': median,
                '25 %': low,
                '75 %': high,
                'host': statistics.median(host),
                'ratio': median / (rows[0]['step'] if rows else median),
            }
        )
    return rows


def quartiles(values):
    """Lower quartile, median and upper quartile of a sample.

    Args:
        values (Sequence[float]): One value or more.

    Returns:
        list[float]: The three.
    """
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method='inclusive')


def main():
    """Measure and print a table."""
    args = parse_args()
    rows = measure(args)
    device = 'CPU'
    if torch.device(args.device).type == 'cuda':
        device = torch.cuda.get_device_name(args.device)
    title = (
        f'{args.model}, batch {args.batch_size}, ms; {device}, torch '
        f'{torch.__version__}'
    )
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        cells = [f'{value:.1f}' for value in list(row.values())[1:-1]]
        table.add_row(row['system'], *cells, f'{row["ratio"]:.3f}')
    Console(width=100).print(table)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != 'out'}
        with open(args.out, 'w') as file:
            json.dump(
                dict(
                    device=device,
                    torch=torch.__version__,
                    settings=settings,
                    rows=rows,
                ),
                file,
                indent=1,
            )


if __name__ == '__main__':
    main()
