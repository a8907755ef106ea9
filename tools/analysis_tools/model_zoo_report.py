"""Memory of one model of each folder of stock configs, as a table.

    python tools/analysis_tools/model_zoo_report.py [PACKAGE ...] --out ZOO

Takes the smallest model by parameters that each folder of a package's configs
trains, for detectors and segmentors that learn from images. Each model is
converted and takes training steps on random images, in a process of its own
with memory_report.py, which needs no data set and no weights.

Results are lines of json: a run that was stopped continues where it was, with
--retry also with what has failed. It exits with 1 if fewer models run than
--at-least says.
"""

import argparse
import collections
import contextlib
import dataclasses
import fnmatch
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from mmengine.logging import MMLogger

import memory_report
import mmactnn
import stock_configs
from mmactnn.codes.units import MIB
from mmactnn.config import DEFAULT_LEVEL
from mmactnn.mmlab import synthetic

RUNS = 'runs'
FAILS = 'fails'
NEEDS_GPU = 'needs a GPU'

# Share of memory that a model is to keep at most.
_GOAL = 6

# Places named in the table.
_TOP = 3

# Modules that take long to import, where they are installed.
_PRELOADED = ('mmdet.models', 'mmdet.datasets', 'mmseg.models')


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
        'packages',
        nargs='*',
        default=['mmdet', 'mmseg'],
        metavar='PACKAGE',
        help='import names; mmdet and mmseg by default',
    )
    parser.add_argument(
        '--out',
        type=Path,
        required=True,
        metavar='JSONL',
        help='file of the results, continued if it is there',
    )
    parser.add_argument(
        '--table', type=Path, metavar='MD', help='file for the table'
    )
    parser.add_argument(
        '--folders',
        nargs='+',
        default=['*'],
        metavar='PATTERN',
        help='of names of folders; all by default',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=[256, 256],
        metavar=('HEIGHT', 'WIDTH'),
        help='of the images; 256 256 by default. Models that do not take '
        'them get larger ones, up to those of their configs',
    )
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument(
        '--level', default=DEFAULT_LEVEL.name, choices=list(mmactnn.LEVELS)
    )
    parser.add_argument('--steps', type=int, default=2)
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    parser.add_argument(
        '--timeout', type=float, default=600, help='seconds of a model'
    )
    parser.add_argument('--retry', action='store_true', help='what has failed')
    parser.add_argument(
        '--at-least',
        type=float,
        default=0.95,
        metavar='SHARE',
        help='share of the models that is to run, without those that need a '
        'GPU where there is none; 0.95 by default',
    )
    args = parser.parse_args(argv)
    for name in ('batch_size', 'shape', 'steps'):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f'{name} must be 1 or more, got {value}')
    return args


class Results:
    """Results of earlier runs and of this one, as lines of json.

    Args:
        path (Path): The file, created with the first result.
        setting (dict): What a result depends on besides the config. Results
            of other settings stay in the file and are not read.
    """

    def __init__(self, path, setting):
        self._path = path
        self._setting = setting
        self._choices = {}
        self._measured = {}
        text = path.read_text() if path.exists() else ''
        for line in text.splitlines():
            # The last one of a run that was killed may be incomplete.
            with contextlib.suppress(json.JSONDecodeError):
                self._read(json.loads(line))
        if text and not text.endswith('\n'):
            path.write_text(text + '\n')

    def _read(self, record):
        if 'choice' in record:
            choice = stock_configs.Choice(**record['choice'])
            self._choices[choice.package, choice.folder] = choice
        elif record['setting'] == self._setting:
            self._measured[record['config']] = record

    def choice(self, package, folder):
        """The config that was chosen for a folder.

        Args:
            package (str): Import name of the package.
            folder (str): The folder.

        Returns:
            Choice: The choice, made now if it was not made before.
        """
        key = package, folder
        if key not in self._choices:
            chosen = stock_configs.choose(package, folder)
            self._choices[key] = chosen
            self._write(dict(choice=dataclasses.asdict(chosen)))
        return self._choices[key]

    def get(self, config):
        """The result of a config.

        Args:
            config (str): The config.

        Returns:
            dict, optional: None if there is none.
        """
        return self._measured.get(config)

    def add(self, record):
        """Keep a result.

        Args:
            record (dict): The result, with the key ``config``.
        """
        record['setting'] = self._setting
        self._measured[record['config']] = record
        self._write(record)

    def _write(self, record):
        with self._path.open('a') as file:
            file.write(json.dumps(record) + '\n')


def measure(choice, args):
    """Measure one model in a process of its own.

    Args:
        choice (Choice): The config.
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        dict: The result.
    """
    record = _run(choice.config, args.shape, args)
    for shape in _larger_shapes(choice.config, args.shape):
        if record['state'] != FAILS or record['seconds'] >= args.timeout:
            break
        larger = _run(choice.config, shape, args)
        if larger['state'] != FAILS:
            return larger
    return record


def _larger_shapes(config, shape):
    """Sizes of images that a model may need in place of smaller ones.

    Args:
        config (str): The config.
        shape (list[int]): Height and width that the model does not take.

    Yields:
        list[int]: Height and width: twice as large and so on, up to those of
        the config's own training.
    """
    try:
        own = synthetic.training_shape(synthetic.load_config(config))
    except (ValueError, ImportError):
        return
    height, width = shape
    while own is not None:
        height, width = 2 * height, 2 * width
        if height * width >= own[0] * own[1]:
            if list(own) != shape:
                yield list(own)
            return
        yield [height, width]


def _run(config, shape, args):
    record = dict(config=config, shape=shape)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, 'report.json'), Path(folder, 'log.txt')
        command = [config, '--shape', *shape, '--level', args.level]
        command += ['--batch-size', args.batch_size, '--steps', args.steps]
        command += ['--device', args.device, '--out', out]
        code = _call(list(map(str, command)), log, args)
        record['seconds'] = round(time.monotonic() - start, 1)
        if code is None:
            reason = f'not done in {args.timeout:g} s'
            return {**record, 'state': FAILS, 'reason': reason}
        if code:
            lines = log.read_text().strip().splitlines() or ['']
            record['reason'] = (
                lines[-1].removeprefix(f'{config}: ') or f'exit status {code}'
            )
            gpu = code == memory_report.NEEDS_GPU
            record['state'] = NEEDS_GPU if gpu else FAILS
            return record
        (figures,) = json.loads(out.read_text())
    record.update(
        state=RUNS,
        reason='',
        losses=figures['losses'],
        exact_bytes=figures['exact_bytes'],
        kept_bytes=figures['kept_bytes'],
        keeps_most=_largest(figures['entries']),
    )
    return record


def _call(arguments, log, args):
    """Run the memory report in a process of its own.

    Args:
        arguments (list[str]): Its command line.
        log (Path): File for what it prints.
        args (argparse.Namespace): From :func:`parse_args`.

    Returns:
        int, optional: Exit status; None if it was killed.
    """
    if args.device == 'cpu':
        # The server imports what takes seconds, once.
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['memory_report', *_PRELOADED])
    else:
        # Some packages set up CUDA as they are imported, and a process that
        # was forked after that cannot use it.
        context = multiprocessing.get_context('spawn')
    process = context.Process(
        target=memory_report.main_in_file, args=(arguments, log)
    )
    process.start()
    process.join(args.timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def _largest(entries):
    """Places that keep most: what it is, how it is kept, and bytes."""
    sizes = collections.Counter()
    for entry in entries:
        cause = entry['source'] or entry['type']
        sizes[cause, entry['category']] += entry['kept_bytes']
    return [[*key, size] for key, size in sizes.most_common(10)]


def make_table(results, chosen):
    """Tabulate the models.

    Args:
        results (Results): The results.
        chosen (list[Choice]): The configs.

    Returns:
        DataFrame: A row for each folder that is not omitted.
    """
    rows = []
    for choice in chosen:
        record = results.get(choice.config)
        if record is None:
            continue
        row = dict(
            package=choice.package,
            folder=choice.folder,
            config=choice.config.rpartition('/')[2].removesuffix('.py'),
            parameters=choice.parameters,
            state=record['state'],
            shape='x'.join(map(str, record['shape'])),
        )
        if record['state'] == RUNS:
            kept = record['kept_bytes']
            row.update(
                exact_mib=record['exact_bytes'] / MIB,
                kept_mib=kept / MIB,
                ratio=record['exact_bytes'] / max(kept, 1),
                keeps_most=', '.join(
                    f'{cause} ({category}) {size / max(kept, 1):.0%}'
                    for cause, category, size in record['keeps_most'][:_TOP]
                ),
            )
        else:
            row['keeps_most'] = record['reason']
        rows.append(row)
    columns = [
        *('package', 'folder', 'config', 'parameters', 'state', 'shape'),
        *('exact_mib', 'kept_mib', 'ratio', 'keeps_most'),
    ]
    return pd.DataFrame(rows, columns=columns)


def to_markdown(table):
    """A table in Markdown.

    Args:
        table (DataFrame): From :func:`make_table`.

    Returns:
        str: The text, with a line for each row.
    """
    titles = [name.replace('_', ' ') for name in table.columns]
    lines = [titles, ['---'] * len(titles)]
    for row in table.itertuples(index=False):
        lines.append([_cell(value) for value in row])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def _cell(value):
    if isinstance(value, float):
        return '' if pd.isna(value) else f'{value:.1f}'
    return str(value).replace('|', '\\|')


def summarize(table):
    """Count what runs and what keeps little.

    Args:
        table (DataFrame): From :func:`make_table`.

    Returns:
        str: A line for each package.
    """
    lines = []
    for package, rows in table.groupby('package'):
        runs = (rows['state'] == RUNS).sum()
        little = (rows['ratio'] >= _GOAL).sum()
        gpu = (rows['state'] == NEEDS_GPU).sum()
        lines.append(
            f'{package}: {runs} of {len(rows)} run ({runs / len(rows):.0%}), '
            f'{little} keep at most 1/{_GOAL} ({little / len(rows):.0%}), '
            f'{gpu} need a GPU'
        )
    return '\n'.join(lines)


def share_that_runs(table):
    """Share of the models that run, of those that can run here.

    Args:
        table (DataFrame): From :func:`make_table`.

    Returns:
        float: From 0 to 1; 1 without any model.
    """
    able = table[table['state'] != NEEDS_GPU]
    return float((able['state'] == RUNS).mean()) if len(able) else 1.0


def main(argv=None):
    """Measure everything, print the table and write it.

    Args:
        argv (list[str], optional): Arguments. Defaults to the process's own.

    Returns:
        int: Exit status.
    """
    args = parse_args(argv)
    MMLogger.get_instance('model_zoo_report', log_level='ERROR')
    setting = dict(
        level=args.level,
        shape=args.shape,
        batch_size=args.batch_size,
        steps=args.steps,
        device=args.device,
    )
    results = Results(args.out, setting)
    chosen = []
    for package in args.packages:
        for folder in stock_configs.folders(package):
            if not any(fnmatch.fnmatch(folder, p) for p in args.folders):
                continue
            choice = results.choice(package, folder)
            if choice.omitted:
                print(f'{package} {folder}: omitted, {choice.omitted}')
                continue
            chosen.append(choice)
            record = results.get(choice.config)
            if record is None or (args.retry and record['state'] != RUNS):
                record = measure(choice, args)
                results.add(record)
            print(
                f'{choice.config}: {record["state"]} {record["reason"]}',
                flush=True,
            )
    table = make_table(results, chosen)
    print(table.to_string(index=False, float_format='{:.1f}'.format))
    print(summarize(table))
    if args.table:
        args.table.write_text(to_markdown(table))
    return int(share_that_runs(table) < args.at_least)


if __name__ == '__main__':
    sys.exit(main())
