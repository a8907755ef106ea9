"""Command lines and output of benchmarks: tables, progress, exit status."""

import argparse
import contextlib
import importlib.util
import json
import traceback
from pathlib import Path

import pandas
import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text


def make_parser(description):
    """Parser of a command line, with a module's docstring as its help."""
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=description, formatter_class=style
    )


def check_positive(parser, args, *names):
    """Exit if settings, or items of lists, are less than 1."""
    for name in names:
        value = getattr(args, name)
        if min(value if isinstance(value, (list, tuple)) else [value]) < 1:
            parser.error(f'{name} must be 1 or more, got {value}')


def require_matplotlib(parser):
    """Exit if matplotlib is missing."""
    if importlib.util.find_spec('matplotlib') is None:
        parser.error('--plot needs pip install "mmactnn[benchmark]"')


def make_figure(panels=1, size=(7, 4.5)):
    """A figure of panels of a size in inches, and their axes as a list."""
    # Not pyplot, which needs a display.
    from matplotlib.figure import Figure

    size = (size[0] * panels, size[1])
    figure = Figure(figsize=size, layout='constrained')
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def make_console():
    """The terminal, or a log with lines wide enough for tables."""
    console = Console()
    # A log has no width.
    return console if console.is_terminal else Console(width=180)


def make_progress(console):
    """Bar of finished trials, with elapsed and remaining time."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def make_table(rows, title=None, columns=None, formats=None):
    """Table of rows or a frame for the terminal, with formats by column."""
    names, *lines = _make_cells(rows, columns, formats)
    table = Table(*(Column(n, overflow='fold') for n in names), title=title)
    for line in lines:
        # Not markup: systems have brackets.
        table.add_row(*map(Text, line))
    return table


def make_markdown(rows, columns=None, formats=None):
    """The same table as text in Markdown."""
    names, *lines = _make_cells(rows, columns, formats)
    lines = [names, ['---'] * len(names), *lines]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _make_cells(rows, columns, formats):
    """Names of columns, followed by rows of texts."""
    # Dtype object, so that integers beside gaps do not become floats.
    frame = pandas.DataFrame(rows, dtype=object).reindex(columns=columns)
    specs = [(formats or {}).get(name, '') for name in frame.columns]
    yield list(frame.columns)
    for row in frame.itertuples(index=False):
        yield [
            '' if value is None or value != value else f'{value:{spec}}'
            for value, spec in zip(row, specs)
        ]


def describe_device(device):
    """``device_name`` (or type), and the version of torch."""
    name = device = torch.device(device)
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    return dict(device_name=str(name), torch=torch.__version__)


def publish(rows, args, title='', device='cuda', formats=None):
    """Print rows, and write them to ``args.out``, with device and settings."""
    where = describe_device(device)
    title += '{device_name}, torch {torch}'.format(**where)
    make_console().print(make_table(rows, title, formats=formats))
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != 'out'}
        text = json.dumps(dict(where, settings=settings, rows=rows), indent=1)
        Path(args.out).write_text(text)


@contextlib.contextmanager
def catching(failures, name):
    """Record and print an error of a trial, so that others continue."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failures[name] = f'{type(error).__name__}: {error}'


def exit_on_failures(failures):
    """Exit with status 1 and the reasons of failures, if there are any."""
    if failures:
        lines = (f'{name}: {reason}' for name, reason in failures.items())
        raise SystemExit('\n  '.join(['failed:', *lines]))
