"""Accuracy of exact and compressed training, over several seeds.

    python tools/benchmark/accuracy.py CONFIG ... --per-gpu 4 --out DIR

Trains every config from every seed at every level with tools/train.py, several
side by side on each GPU, and compares the means of its metric at the last
evaluation that all runs of a config have. Losses and metrics are written to
DIR/results.json, the comparison to DIR/table.md, checkpoints and logs to a
folder of each run beside them. --levels are names, or names and what differs
from them, as L3:{"norm": 4}; the first is the reference of the comparison, and
--bounds says how far from it the means of a config may be. With --probe CONFIG
PROBE, the self-supervised CONFIG is evaluated by training PROBE, a config, on
its backbone. By default all GPUs are used; --gpus 0 is the CPU.

A command that is started again resumes from the last checkpoints and skips
finished runs; without configs, it reports the results in DIR. After --limit
seconds no run begins, and those that run are stopped, for such a command.

ActNNHook must be the first custom hook of the configs. Times are meaningless
where trainings share a GPU. The exit status is 1 if a run failed.
"""

import asyncio
import math
import time
from pathlib import Path

import torch

import mmactnn
from comparison import plots
from comparison.run import Run
from comparison.schedule import make_slots, train_all
from comparison.summary import summarize
from shared import output
from shared.levels import read_level
from shared.processes import exit_on_sigterm
from shared.results import OK, UNFINISHED, Results


def bound(text):
    """Name and value of a bound, of a text NAME=VALUE."""
    name, _, value = text.partition('=')
    return name, float(value)


def parse_args(argv=None):
    """Read and check the command line."""
    parser = output.make_parser(__doc__)
    add = parser.add_argument
    add('configs', nargs='*', metavar='CONFIG')
    add('--levels', nargs='+', default=['L0', 'L3'])
    add('--seeds', nargs='+', type=int, default=[0, 1, 2])
    add('--probe', nargs=2, action='append', default=[], help='CONFIG PROBE')
    add('--cfg-options', nargs='+', default=[], help='KEY=VALUE of configs')
    add('--metrics', nargs='+', help='the first that a run has is compared')
    add('--gpus', type=int, default=torch.cuda.device_count(), help='or CPU')
    add('--per-gpu', type=int, default=1, help='trainings side by side')
    add('--timeout', type=float, help='seconds of each training')
    add('--limit', type=float, default=math.inf, help='seconds of all')
    add('--bounds', nargs='+', type=bound, default=[], help='NAME=VALUE')
    add('--out', type=Path, default=Path('work_dirs/accuracy'), help='folder')
    add('--plot', action='store_true', help='draw curves into --out, too')
    args = parser.parse_args(argv)
    output.check_positive(parser, args, 'per_gpu', 'limit')
    for level in args.levels:
        try:
            mmactnn.get_level(read_level(level))
        except (TypeError, ValueError) as error:
            parser.error(f'--levels {level}: {error}')
    for config in (*args.configs, *(probe for _, probe in args.probe)):
        if not Path(config).is_file():
            parser.error(f'a config must be a file, got {config!r}')
    names = [Path(config).stem for config in args.configs]
    if len(set(names)) < len(names):
        parser.error(f'configs must have names of their own, got {names}')
    for config, _ in args.probe:
        if config not in args.configs:
            parser.error(f'--probe must follow a config, got {config!r}')
    if args.gpus < 0:
        parser.error(f'--gpus must be 0 or more, got {args.gpus}')
    if args.plot:
        output.require_matplotlib(parser)
    return args


def begin(runs, results):
    """Add runs to the results; return unfinished ones."""
    earlier = {run.name: run for run in map(results.trial, results.rows)}
    for run in runs:
        # Runs of the same name share a work directory.
        if earlier.setdefault(run.name, run) != run:
            raise ValueError(
                f'the results hold {earlier[run.name]}, got {run}: other '
                'settings need another folder'
            )
        if results.find(run) is None:
            results.put(run, dict(result=UNFINISHED))
    return [run for run in runs if results.find(run)['result'] != OK]


def describe(row):
    """Describe the state and results of a run in a line."""
    text = '{config} {level} seed {seed}: {result}'.format(**row)
    if row.get('message'):
        text += f' ({row["message"]})'
    if row.get('evaluations'):
        step, value = row['evaluations'][-1]
        text += f', {row["metric"]} {value:.3f} at {row["unit"]} {step}'
    return text


def train(args, results, console):
    """Train runs, save and print their results; return failures by name."""
    end = time.monotonic() + args.limit
    folder, failures, probes = args.out.resolve(), {}, dict(args.probe)
    # Levels of the same config and seed are neighbours.
    runs = [
        Run(config, level, seed, tuple(args.cfg_options), probes.get(config))
        for config in args.configs
        for seed in args.seeds
        for level in args.levels
    ]
    try:
        runs = begin(runs, results)
        slots = make_slots(args.gpus, args.per_gpu)
    except ValueError as error:
        raise SystemExit(f'{args.out}: {error}') from None
    with output.make_progress(console) as progress:
        bar = progress.add_task('runs', total=len(runs))

        async def train_one(run, slot):
            left = end - time.monotonic()
            if left <= 0:
                return
            training = run.train(folder, slot, args.timeout)
            try:
                outcome = await asyncio.wait_for(training, left)
            except asyncio.TimeoutError:
                outcome = dict(result=UNFINISHED, message=None)
            figures = outcome | run.read_figures(folder, args.metrics)
            row = results.put(run, figures)
            if row['result'] not in (OK, UNFINISHED):
                failures[run.name] = row['message'] or row['result']
            progress.console.print(describe(row), markup=False)
            progress.advance(bar)

        asyncio.run(train_all(runs, slots, train_one))
    return failures


def main(argv=None):
    """Train everything and print a table."""
    args = parse_args(argv)
    console, results = output.make_console(), Results(Run, args.out)
    failures = train(args, results, console)
    summaries, bounds = summarize(results.rows), dict(args.bounds)
    for name in sorted(bounds.keys() - {s.config for s in summaries}):
        print('no results for the bound of', name)
    table = [
        row
        for summary in summaries
        for row in summary.table(bounds.get(summary.config))
    ]
    seeds = sorted({seed for s in summaries for seed in s.seeds})
    formats = {f'seed {seed}': '.3f' for seed in seeds}
    formats |= {'mean': '.3f', 'spread': '.3f', 'difference': '+.3f'}
    formats |= {'bound': '.3f', 'within': ''} if bounds else {}
    formats |= {'activations, MiB': '.1f'}
    columns = ('config', 'metric', 'at', 'level', *formats)
    console.print(output.make_table(table, columns=columns, formats=formats))
    markdown = output.make_markdown(table, columns, formats)
    (args.out / 'table.md').write_text(markdown)
    for summary in summaries if args.plot else ():
        path = args.out / f'{summary.config}_accuracy.png'
        plots.plot(summary).savefig(path, dpi=100)
        console.print(f'wrote {path}', markup=False)
    for row in results.rows:
        if row['result'] != OK:
            print('not trained to the end:', describe(row))
    output.exit_on_failures(failures)


if __name__ == '__main__':
    exit_on_sigterm()
    main()
