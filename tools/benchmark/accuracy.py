"""Accuracy of exact and compressed training, over several seeds.

    python tools/benchmark/accuracy.py CONFIG ... --per-gpu 4 --out DIR

Trains every config from every seed at every level with tools/train.py,
several side by side on each GPU, and compares, at the last evaluation that
all runs of a config have, the means of its metric. Losses and metrics are in
DIR/results.json, checkpoints and logs in a folder of each run beside it. A
command that is started again goes on from the last checkpoints and trains
nothing that has finished; without configs, it reports what DIR holds.

The hook, ActNNHook, must be the first custom hook of the configs. Times mean
nothing where trainings share a GPU.
"""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import torch

import mmactnn
from comparison import plots, report
from comparison.results import Results
from comparison.run import Run
from comparison.scalars import read_figures
from comparison.schedule import make_slots, train_all, train_run, work_dirs
from comparison.summary import summarize
from training.progress import make_console, make_progress

METRICS = ('coco/bbox_mAP', 'mIoU', 'accuracy/top1')


def parse_args(argv=None):
    """Read the command line.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.

    Returns:
        argparse.Namespace: Settings, of which those that are wrong without
        anything being trained have been reported.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='*', metavar='CONFIG')
    parser.add_argument(
        '--levels',
        nargs='+',
        choices=list(mmactnn.LEVELS),
        default=['L0', 'L3'],
        help='the first is what the others are compared with',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--probe',
        nargs=2,
        action='append',
        default=[],
        metavar=('CONFIG', 'PROBE'),
        help='what CONFIG learns without labels is measured by training '
        'PROBE, a config, on its backbone',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the configs, but not of probes',
    )
    parser.add_argument(
        '--metrics',
        nargs='+',
        default=list(METRICS),
        help='names in the log; the first that a run has is compared',
    )
    parser.add_argument(
        '--gpus',
        type=int,
        default=torch.cuda.device_count(),
        help='how many to use (default: all); 0 trains on the CPU',
    )
    parser.add_argument(
        '--per-gpu',
        type=int,
        default=1,
        help='trainings side by side on each GPU, or on the CPU',
    )
    parser.add_argument(
        '--timeout', type=float, metavar='SECONDS', help='of each training'
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/accuracy'),
        metavar='DIR',
        help='folder for results and work directories (default: %(default)s)',
    )
    parser.add_argument(
        '--plot', action='store_true', help='draw curves into --out, too'
    )
    args = parser.parse_args(argv)
    try:
        _check(args)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def _check(args):
    for config in (*args.configs, *(probe for _, probe in args.probe)):
        if not Path(config).is_file():
            raise ValueError(f'a config must be a file, got {config!r}')
    names = [Path(config).stem for config in args.configs]
    if len(set(names)) < len(names):
        raise ValueError(f'configs must have names of their own, got {names}')
    for config, _ in args.probe:
        if config not in args.configs:
            raise ValueError(
                f'--probe must follow one of the configs, got {config!r}'
            )
    if args.gpus < 0 or args.per_gpu < 1:
        raise ValueError(
            '--gpus must be 0 or more and --per-gpu 1 or more, got '
            f'{args.gpus} and {args.per_gpu}'
        )
    if args.plot:
        plots.require_matplotlib()


def make_runs(args):
    """What a command line asks to train.

    Args:
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        list[Run]: Runs, levels of a config and seed side by side.
    """
    probes = dict(args.probe)
    return [
        Run(config, level, seed, tuple(args.cfg_options), probes.get(config))
        for config in args.configs
        for seed in args.seeds
        for level in args.levels
    ]


def main(argv=None):
    """Train everything and print a table.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.
    """
    args = parse_args(argv)
    console = make_console()
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    runs = [run for run in make_runs(args) if results.begin(run)]
    if runs:
        train(runs, results, folder, args, console)
    summaries = summarize(results.rows)
    console.print(report.make_table(summaries))
    for line in report.unfinished(results.rows):
        console.print(f'not trained to the end: {line}', markup=False)
    if args.plot:
        for path in plots.write_plots(summaries, folder):
            console.print(f'wrote {path}', markup=False)


def train(runs, results, folder, args, console):
    """Train runs and keep what they reach.

    Args:
        runs (list[Run]): Runs that have begun.
        results (Results): Where to keep it.
        folder (Path): Where work directories are.
        args (argparse.Namespace): From :func:`parse_args`.
        console (Console): Where to print.
    """
    slots = make_slots(args.gpus, args.per_gpu)
    with make_progress(console) as progress:
        bar = progress.add_task('runs', total=len(runs))

        async def train_one(run, slot):
            figures = await train_run(run, folder, slot, args.timeout)
            figures |= read_figures(*work_dirs(run, folder), args.metrics)
            row = results.end(run, figures)
            progress.console.print(report.describe(row), markup=False)
            progress.advance(bar)

        asyncio.run(train_all(runs, slots, train_one))


if __name__ == '__main__':
    # An exception, upon which the trainings are ended, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
