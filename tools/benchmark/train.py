"""Speed and memory of training, by exact, compressed and other systems.

    python tools/benchmark/train.py --systems exact L3 --batch-size 64 128

Trains models on random images, each of them by each system (and batch size)
in a process of its own, and measures after a warm-up

images/s     batch size over the median time of a step
activations  what autograd saves, on the host included
on host      those of them that wait in host memory
peak         most that the CUDA allocator handed out in the timed steps

MiB = 2^20 bytes. With --out, results are written after each measurement, and
a run that is started again measures only what is missing. Without a GPU
(--device cpu) there is no peak.
"""

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

import mmactnn
from training import models, plots, report
from training.process import measure_file, run_trial
from training.progress import make_console, make_progress
from training.search import search_largest
from training.systems import parse_system
from training.trial import OK, OUT_OF_MEMORY, Trial

# Changes one size of a trial, and the smallest that is tried.
QUANTITIES = {
    'batch': (
        lambda trial, n: dataclasses.replace(trial, batch_size=n),
        1,
    ),
    'image-size': (
        lambda trial, n: dataclasses.replace(trial, image_size=(n, n)),
        32,
    ),
    'depth': (
        lambda trial, n: dataclasses.replace(
            trial, model=models.scale_resnet(trial.model, depth=n)
        ),
        50,
    ),
    'width': (
        lambda trial, n: dataclasses.replace(
            trial, model=models.scale_resnet(trial.model, width=n)
        ),
        1,
    ),
}


def parse_args(argv=None):
    """Read the command line.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.

    Returns:
        argparse.Namespace: Settings, of which those that are wrong without
        anything being built have been reported.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=['resnet50'],
        help='classifiers of torchvision, resnet:depth=D,width=W, config '
        'files, or configs of installed packages such as '
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    )
    parser.add_argument(
        '--systems',
        nargs='+',
        default=['exact', *mmactnn.LEVELS],
        help='exact, checkpoint, save_on_cpu, compile, compile:BUDGET, levels '
        'by name, levels varied by json (L3:{"conv":4}); each perhaps with '
        'a precision (exact+fp16)',
    )
    parser.add_argument('--batch-size', nargs='+', type=int, default=[256])
    parser.add_argument(
        '--image-size',
        nargs='+',
        type=int,
        default=[224],
        help='height and width, or both in one',
    )
    parser.add_argument(
        '--amp', choices=['fp16', 'bf16'], help='autocast to this dtype'
    )
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the configs',
    )
    parser.add_argument('--warmup', type=int, default=12, help='steps')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--device', default='cuda')
    parser.add_argument(
        '--memory-limit',
        type=float,
        metavar='MIB',
        help='GPU memory that a process may take',
    )
    parser.add_argument(
        '--largest',
        choices=QUANTITIES,
        help='search for the largest that trains, for each model and system',
    )
    parser.add_argument(
        '--resolution',
        type=int,
        default=16,
        help='the search tries multiples of this',
    )
    parser.add_argument(
        '--timeline',
        action='store_true',
        help='follow the memory through one more step',
    )
    parser.add_argument(
        '--timeout', type=float, metavar='SECONDS', help='of a measurement'
    )
    parser.add_argument(
        '--out', metavar='DIR', help='folder for results, and to resume from'
    )
    parser.add_argument(
        '--plot', action='store_true', help='draw figures into --out, too'
    )
    parser.add_argument(
        '--measure',
        nargs=2,
        metavar=('TRIAL', 'ROW'),
        help='only measure the trial in one json file, in this process, and '
        'write what was measured to another; nothing else counts then',
    )
    args = parser.parse_args(argv)
    try:
        _check(args)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def _check(args):
    for system in args.systems:
        parse_system(system)
    if len(args.image_size) > 2:
        raise ValueError(
            f'--image-size must be one or two numbers, got {args.image_size}'
        )
    for name in ('batch_size', 'image_size', 'steps', 'resolution'):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f'{name} must be 1 or more, got {value}')
    if args.largest in ('depth', 'width'):
        for model in args.models:
            models.parse_resnet(model)
    if args.plot:
        if args.out is None:
            raise ValueError('--plot needs a folder: --out DIR')
        if args.largest not in (None, 'batch'):
            raise ValueError(
                'figures are drawn over the batch size; --plot must be left '
                f'out with --largest {args.largest}'
            )
        plots.require_matplotlib()


def make_trials(args):
    """What a command line asks to measure.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        list[Trial]: Trials, systems of a model and size side by side.
    """
    height, width = args.image_size * (2 if len(args.image_size) == 1 else 1)
    # A search sets the size itself, so that it begins from no other.
    batch_sizes = args.batch_size
    if args.largest == 'batch':
        batch_sizes = batch_sizes[:1]
    return [
        Trial(
            model=model,
            system=system,
            batch_size=batch_size,
            image_size=(height, width),
            precision=(parse_system(system).precision or args.amp or 'fp32'),
            channels_last=args.channels_last,
            cfg_options=(
                tuple(args.cfg_options) if models.is_config(model) else ()
            ),
            device=args.device,
            warmup=args.warmup,
            steps=args.steps,
            memory_limit_mib=args.memory_limit,
            timeline=args.timeline,
        )
        for model in args.models
        for batch_size in batch_sizes
        for system in args.systems
    ]


def find_largest(trial, quantity, resolution, measure):
    """Search for the largest size that trains.

    Args:
        trial (Trial): What is measured at other sizes.
        quantity (str): One of ``QUANTITIES``.
        resolution (int): Sizes are multiples of it.
        measure (Callable): Returns the row of a trial.

    Returns:
        dict: The size as ``largest``, None if not even the smallest trains,
        and the row of that size. If a measurement fails by anything but
        memory, the search ends with that ``result``.
    """
    resize, minimum = QUANTITIES[quantity]
    rows = {}

    def fits(size):
        rows[size] = measure(resize(trial, size))
        if rows[size]['result'] not in (OK, OUT_OF_MEMORY):
            raise _Failed(rows[size])
        return rows[size]['result'] == OK

    try:
        largest = search_largest(fits, minimum, resolution)
        row = rows.get(largest, dict(result=OUT_OF_MEMORY))
    except _Failed as failure:
        largest, row = None, failure.row
    return {
        **dataclasses.asdict(trial),
        **row,
        'model': trial.model,
        'quantity': quantity,
        'largest': largest,
    }


class _Failed(Exception):
    """A measurement failed, and not for want of memory."""

    def __init__(self, row):
        super().__init__(row['result'])
        self.row = row


def main(argv=None):
    """Measure everything and print a table.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.
    """
    args = parse_args(argv)
    if args.measure:
        measure_file(*args.measure)
        return
    console = make_console()
    results = report.Results(args.out)
    trials = make_trials(args)
    used, largest = [], []
    with make_progress(console) as progress:
        bar = progress.add_task('', total=len(trials))

        def measure(trial):
            progress.update(bar, description=describe(trial))
            row = results.find(trial)
            if row is None:
                row = results.add(trial, run_trial(trial, args.timeout))
            used.append(row)
            figure = row.get('message') or row.get('images_per_s', '')
            progress.console.print(
                f'{describe(trial)}: {row["result"]} {figure}', markup=False
            )
            return row

        for trial in trials:
            if args.largest:
                row = find_largest(
                    trial, args.largest, args.resolution, measure
                )
                largest.append(row)
            else:
                measure(trial)
            progress.advance(bar)
    console.print(report.make_table(used))
    if largest:
        console.print(report.make_largest_table(largest))
    if args.out:
        folder = Path(args.out)
        if largest:
            report.write_json(folder / 'largest.json', largest)
            report.write_csv(folder / 'largest.csv', largest, report.LARGEST)
        if args.plot:
            for path in plots.write_plots(used, folder):
                console.print(f'wrote {path}', markup=False)


def describe(trial):
    """A trial in a few words.

    Args:
        trial (Trial): The trial.

    Returns:
        str: Model, system and sizes.
    """
    height, width = trial.image_size
    model = trial.model.rpartition('/')[2]
    return (
        f'{model} {trial.system}, batch {trial.batch_size} of {height}x{width}'
    )


if __name__ == '__main__':
    # An exception, upon which the process of the measurement is ended, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
