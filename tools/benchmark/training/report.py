"""Keeps what was measured, and prints it."""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path

from rich.table import Table

from .trial import FINISHED, Trial

FIGURES = (
    'result',
    'images_per_s',
    'ms_per_step',
    'activations_mib',
    'on_host_mib',
    'peak_mib',
    'reserved_mib',
    'finite',
    'message',
    'device_name',
    'torch',
)
SETTINGS = tuple(field.name for field in dataclasses.fields(Trial))
LARGEST = (
    'model',
    'system',
    'quantity',
    'largest',
    'result',
    'images_per_s',
    'activations_mib',
    'peak_mib',
    'memory_limit_mib',
)


class Results:
    """Rows of what was measured, in files that are complete at any time.

    ``results.json`` has a row a line and is read again, ``results.csv`` is
    the same without the samples of timelines. Output of processes that failed
    is added to ``errors.log``.

    Args:
        folder (str, optional): Where the files are. Defaults to no files.

    Attributes:
        rows (list[dict]): A trial and what was measured in each.
    """

    def __init__(self, folder=None):
        self.folder = None if folder is None else Path(folder)
        self.rows = []
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / 'results.json'
            if path.exists():
                self.rows = json.loads(path.read_text())

    def find(self, trial):
        """What was measured of a trial before.

        Args:
            trial (Trial): The trial.

        Returns:
            dict, optional: Its row, if there is one that is no failure.
        """
        for row in self.rows:
            if row['result'] in FINISHED and Trial.from_dict(row) == trial:
                return row
        return None

    def add(self, trial, figures):
        """Keep what was measured, in place of what failed before.

        Args:
            trial (Trial): What was measured.
            figures (dict): What :func:`training.process.run_trial` returned.

        Returns:
            dict: The row.
        """
        figures = dict(figures)
        log = figures.pop('log', None)
        row = {**dataclasses.asdict(trial), **figures}
        self.rows = [r for r in self.rows if Trial.from_dict(r) != trial]
        self.rows.append(row)
        if self.folder is not None:
            write_json(self.folder / 'results.json', self.rows)
            write_csv(
                self.folder / 'results.csv', self.rows, SETTINGS + FIGURES
            )
            if log is not None:
                with open(self.folder / 'errors.log', 'a') as file:
                    file.write(f'{trial}\n{log}\n')
        return row


def write_json(path, rows):
    """Write rows, one a line.

    Args:
        path (Path): The file; it is replaced as a whole.
        rows (list[dict]): Rows.
    """
    lines = ',\n'.join(json.dumps(row) for row in rows)
    _replace(path, f'[\n{lines}\n]\n')


def write_csv(path, rows, columns):
    """Write rows as a table.

    Args:
        path (Path): The file; it is replaced as a whole.
        rows (list[dict]): Rows. What they lack is left empty.
        columns (Sequence[str]): Which of their entries to write.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction='ignore')
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                key: ' '.join(map(str, value))
                if isinstance(value, (list, tuple))
                else value
                for key, value in row.items()
            }
        )
    _replace(path, text.getvalue())


def make_table(rows):
    """A table of rows for the terminal.

    Args:
        rows (list[dict]): Rows of :class:`Results`.

    Returns:
        Table: The table.
    """
    devices = sorted(
        {
            f'{row["device_name"]}, torch {row["torch"]}'
            for row in rows
            if 'device_name' in row
        }
    )
    columns = {
        'model': lambda row: _short(row['model']),
        'system': lambda row: row['system'],
        'batch': lambda row: row['batch_size'],
        'image': lambda row: '{}x{}'.format(*row['image_size']),
        'images/s': lambda row: row.get('images_per_s'),
        'ms/step': lambda row: row.get('ms_per_step'),
        'activations, MiB': lambda row: row.get('activations_mib'),
        'on host, MiB': lambda row: row.get('on_host_mib'),
        'peak, MiB': lambda row: row.get('peak_mib'),
        'result': _describe_result,
    }
    return _table('; '.join(devices), rows, columns)


def make_largest_table(rows):
    """A table of the largest values for the terminal.

    Args:
        rows (list[dict]): A model, a system and the largest value in each.

    Returns:
        Table: The table.
    """
    columns = {
        'model': lambda row: _short(row['model']),
        'system': lambda row: row['system'],
        'largest': lambda row: row['quantity'],
        'value': lambda row: row['largest'],
        'images/s': lambda row: row.get('images_per_s'),
        'peak, MiB': lambda row: row.get('peak_mib'),
        'result': _describe_result,
    }
    return _table('Largest that trains', rows, columns)


def _table(title, rows, columns):
    table = Table(title=title)
    for name in columns:
        table.add_column(name)
    for row in rows:
        cells = (value(row) for value in columns.values())
        table.add_row(*('' if c is None else str(c) for c in cells))
    return table


def _describe_result(row):
    if row.get('finite') is False:
        return 'loss is not finite'
    return row['result']


def _short(model):
    return model.rpartition('/')[2]


def _replace(path, text):
    """Write a file so that it is there as a whole or not at all."""
    part = path.with_name(f'{path.name}.part')
    part.write_text(text)
    os.replace(part, path)
