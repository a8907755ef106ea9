"""Speed and memory of training with exact, compressed and other systems.

    python tools/benchmark/train.py --systems exact L3 --batch-size 64 128

Trains models on random images, each of them by each system (and batch size)
in a process of its own, and measures after a warm-up.

models   classifiers of torchvision, resnet:depth=D,width=W, config files, or
         configs of installed packages, such as
         mmdet::retinanet/retinanet_r50_fpn_1x_coco.py
systems  exact, checkpoint, save_on_cpu, compile, compile:SHARE, levels by
         name, levels varied by json (L3:{"conv":4}), with parts as CUDA
         graphs (L3:{"cuda_graphs":["extract_feat"]}); each perhaps with a
         precision (exact+fp16)

images_per_s     batch size over the median time of a step
activations_mib  tensors that autograd saves, on the host included
on_host_mib      those of them that are in host memory
pinned_mib       pinned host memory
peak_mib         most memory that the CUDA allocator allocated in the timed
                 steps, without what graphs only hold
reserved_mib     most memory that it took from the device, with both
overlapped       with --trace, the share of copies between host and device
                 during which a kernel runs

MiB = 2^20 bytes. With --out, results are written after each measurement, and
a run that is started again only makes missing measurements. Without a GPU
(--device cpu) there is no peak. The exit status is 1 if a measurement failed;
running out of memory is a result.
"""

import argparse
import json
from pathlib import Path

import pandas

import mmactnn
from shared import output
from shared.processes import exit_on_sigterm
from shared.results import FINISHED, Results, write_rows
from training import models, plots
from training.largest import QUANTITIES, find_largest
from training.measure import measure
from training.process import run_trial
from training.systems import parse_system
from training.trial import Trial, file_name, short_name

COLUMNS = (
    *('model', 'system', 'quantity', 'largest', 'batch_size', 'image_size'),
    *('images_per_s', 'ms_per_step', 'activations_mib', 'on_host_mib'),
    *('pinned_mib', 'peak_mib', 'reserved_mib', 'overlapped', 'result'),
)


def parse_args(argv=None):
    """Read and check the command line."""
    parser = output.make_parser(__doc__)
    add = parser.add_argument
    add('--models', nargs='+', default=['resnet50'])
    add('--systems', nargs='+', default=['exact', *mmactnn.LEVELS])
    add('--batch-size', nargs='+', type=int, default=[256])
    add('--image-size', nargs='+', type=int, default=[224], help='one or two')
    add('--amp', choices=['fp16', 'bf16'], help='autocast to this dtype')
    add('--channels-last', action='store_true')
    add('--cfg-options', nargs='+', default=[], help='KEY=VALUE of configs')
    add('--warmup', type=int, default=12, help='steps')
    add('--steps', type=int, default=10)
    add('--device', default='cuda')
    add('--memory-limit', type=float, help='MiB on the GPU of a process')
    add('--largest', choices=QUANTITIES, help='search for what still trains')
    add('--resolution', type=int, default=16, help='unit of the search')
    add('--timeline', action='store_true', help='memory through one step')
    add('--trace', type=Path, help='folder for chrome traces of two steps')
    add('--timeout', type=float, help='seconds of a measurement')
    add('--out', type=Path, help='folder for results, and to resume from')
    add('--plot', action='store_true', help='draw figures into --out, too')
    # Json files of a trial, to measure in this process, and of its row.
    add('--measure', nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sizes = ('batch_size', 'image_size', 'steps', 'resolution')
    output.check_positive(parser, args, *sizes)
    try:
        for system in args.systems:
            parse_system(system)
        for model in args.models if args.largest in ('depth', 'width') else ():
            models.parse_resnet(model)
    except ValueError as error:
        parser.error(str(error))
    if len(args.image_size) > 2:
        parser.error(
            f'--image-size must be one or two numbers, got {args.image_size}'
        )
    if args.plot and args.out is None:
        parser.error('--plot needs a folder: --out DIR')
    if args.plot and args.largest not in (None, 'batch'):
        parser.error(f'--plot goes with --largest batch, got {args.largest}')
    if args.plot:
        output.require_matplotlib(parser)
    return args


def make_trials(args):
    """Trials of a command line, systems of a model and size side by side."""
    # A search sets the size itself, so that it begins from no other.
    sizes = args.batch_size[: 1 if args.largest == 'batch' else None]
    trace = args.trace
    return [
        Trial(
            model=model,
            system=system,
            batch_size=size,
            image_size=(args.image_size[0], args.image_size[-1]),
            precision=parse_system(system).precision or args.amp or 'fp32',
            channels_last=args.channels_last,
            cfg_options=tuple(args.cfg_options * models.is_config(model)),
            device=args.device,
            warmup=args.warmup,
            steps=args.steps,
            memory_limit_mib=args.memory_limit,
            timeline=args.timeline,
            trace=trace
            and f'{trace}/{file_name(f"{model}_{system}_{size}")}.json',
        )
        for model in args.models
        for size in sizes
        for system in args.systems
    ]


def measure_all(args, console):
    """Rows of measurements, rows of trials or searches, and failures."""
    results, used, failures = Results(Trial, args.out, csv=True), [], {}
    progress = output.make_progress(console)
    bar = progress.add_task('', total=None)

    def run(trial):
        progress.update(bar, description=str(trial))
        row = results.find(trial)
        if row is None or row['result'] not in FINISHED:
            figures = run_trial(trial, args.timeout)
            log = figures.pop('log', None)
            row = results.put(trial, figures)
            if log and args.out:
                with open(args.out / 'errors.log', 'a') as file:
                    file.write(f'{trial!r}\n{log}\n')
        used.append(row)
        figure = row.get('message') or row.get('images_per_s', '')
        text = f'{row["result"]} {figure}'.strip()
        if row['result'] not in FINISHED:
            failures[str(trial)] = text
        progress.console.print(f'{trial}: {text}', markup=False)
        return row

    def search(trial):
        return find_largest(trial, args.largest, args.resolution, run)

    with progress:
        trials = progress.track(make_trials(args), task_id=bar)
        rows = [search(t) if args.largest else run(t) for t in trials]
    return used, rows, failures


def show(console, rows, title=None):
    """Print rows as a table."""
    frame = pandas.DataFrame(rows, dtype=object)
    frame['model'] = frame['model'].map(short_name)
    frame['image_size'] = frame['image_size'].map('{0[0]}x{0[1]}'.format)
    if 'finite' in frame:
        lost = frame.finite.eq(False)
        frame['result'] = frame.result.mask(lost, 'loss is not finite')
    columns = [name for name in COLUMNS if name in frame]
    console.print(output.make_table(frame, title, columns))


def main(argv=None):
    """Measure everything and print a table."""
    args = parse_args(argv)
    if args.measure:
        spec, path = args.measure
        trial = Results(Trial).trial(json.loads(spec.read_text()))
        path.write_text(json.dumps(measure(trial)))
        return
    console = output.make_console()
    used, rows, failures = measure_all(args, console)
    where = '{device_name}, torch {torch}'
    devices = {where.format(**row) for row in used if 'torch' in row}
    show(console, used, '; '.join(sorted(devices)))
    if args.largest:
        show(console, rows, 'Largest that trains')
        if args.out:
            write_rows(args.out / 'largest.json', rows, csv=True)
    if args.plot:
        for path in plots.write_plots(used, args.out):
            console.print(f'wrote {path}', markup=False)
    output.exit_on_failures(failures)


if __name__ == '__main__':
    exit_on_sigterm()
    main()
