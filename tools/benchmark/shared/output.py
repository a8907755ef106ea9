"""Command lines and output of benchmarks: tables, progress, exit status."""

import argparse
import contextlib
import json
import traceback

import pandas
import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


def make_parser(description):
    """Parser of a command line, whose help is the text of a module."""
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def check_positive(parser, args, *names):
    """Report settings, or lists of them, that are less than 1."""
    for name in names:
        value = getattr(args, name)
        if min(value if isinstance(value, (list, tuple)) else [value]) < 1:
            parser.error(f'{name} must be 1 or more, got {value}')


def require_matplotlib():
    """Raise a ValueError if figures cannot be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'plots need matplotlib, which is not installed: '
            'pip install "mmactnn[benchmark]"'
        ) from error


def make_figure(panels=1, size=(7, 4.5)):
    """A figure of panels of a size in inches, and their axes as a list."""
    # Not pyplot: there need not be a display.
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width * panels, height), layout='constrained')
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def make_console():
    """The terminal, or a log with lines wide enough for tables."""
    console = Console()
    # A log has no width of its own.
    return console if console.is_terminal else Console(width=140)


def make_progress(console):
    """Bar of finished trials, with elapsed and remaining time."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def make_table(rows, title=None, columns=None, formats=None):
    """Table of rows for the terminal.

    Args:
        rows (list[dict] | DataFrame): The rows.
        title (str, optional): Line above. Defaults to none.
        columns (Sequence[str], optional): Columns. Defaults to all.
        formats (dict[str, str], optional): Specifications of numbers by
            column.

    Returns:
        Table: The table; gaps are empty.
    """
    # Of objects, so that a whole number beside a gap stays one.
    frame = pandas.DataFrame(rows, dtype=object).reindex(columns=columns)
    table = Table(title=title)
    for name, values in frame.items():
        right = any(isinstance(value, (int, float)) for value in values)
        table.add_column(name, justify='right' if right else 'left')
        spec = (formats or {}).get(name, '')
        # Not markup: systems have brackets.
        frame[name] = [
            Text(
                ''
                if v is None or v != v
                else format(v, spec)
                if spec
                else str(v)
            )
            for v in values
        ]
    for row in frame.itertuples(index=False):
        table.add_row(*row)
    return table


def device_name(device):
    """Name of a GPU, or type of another device."""
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return device.type


def publish(rows, args, title='', device='cuda', formats=None):
    """Print a table and write it to ``--out``, with where it comes from.

    Args:
        rows (list[dict]): The rows.
        args (argparse.Namespace): Settings, with a file ``out`` or None.
        title (str, optional): Line above, before the device.
        device (str, optional): Device of the figures. Defaults to 'cuda'.
        formats (dict[str, str], optional): See :func:`make_table`.
    """
    where = dict(device=device_name(device), torch=torch.__version__)
    title = f'{title}{where["device"]}, torch {where["torch"]}'
    make_console().print(make_table(rows, title, formats=formats))
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != 'out'}
        with open(args.out, 'w') as file:
            json.dump(
                dict(where, settings=settings, rows=rows), file, indent=1
            )


@contextlib.contextmanager
def catching(failures, name):
    """Print an error of a trial and note it by name, so that others go on."""
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
