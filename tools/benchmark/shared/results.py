"""Rows of results in files that are always complete."""

import dataclasses
import json
import os
from pathlib import Path

import pandas

# Results of a trial; the first two are valid measurements.
OK = 'ok'
OUT_OF_MEMORY = 'out of memory'
TIMEOUT = 'timeout'
ERROR = 'error'
UNFINISHED = 'unfinished'
FINISHED = (OK, OUT_OF_MEMORY)


class Results:
    """Rows of trials, of a dataclass, with their figures, kept in a folder.

    ``results.json`` is read again, ``results.csv`` is for other programs.
    """

    def __init__(self, kind, folder=None, csv=False):
        self.rows = []
        self._kind, self._csv, self._path = kind, csv, None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / 'results.json'
            if self._path.exists():
                self.rows = json.loads(self._path.read_text())

    def trial(self, row):
        """Trial of a row, with tuples for lists."""
        names = {field.name for field in dataclasses.fields(self._kind)}
        settings = {name: row[name] for name in names & row.keys()}
        for name, value in settings.items():
            if isinstance(value, list):
                settings[name] = tuple(value)
        return self._kind(**settings)

    def find(self, trial):
        """Row of a trial, or None."""
        return next((r for r in self.rows if self.trial(r) == trial), None)

    def put(self, trial, figures):
        """Replace the figures in the row of a trial."""
        row, earlier = dataclasses.asdict(trial) | figures, self.find(trial)
        if earlier is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(earlier)] = row
        if self._path is not None:
            write_rows(self._path, self.rows, self._csv)
        return row


def write_rows(path, rows, csv=False):
    """Write rows to a json file, one a line, and to a csv file beside it.

    The latter has all but the samples of curves.
    """
    texts = {path: '[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n'}
    if csv:
        # Dtype object, so that integers beside gaps do not become floats.
        frame = pandas.DataFrame(rows, dtype=object)
        frame = frame.drop(columns='samples', errors='ignore')
        texts[path.with_suffix('.csv')] = frame.to_csv(index=False)
    for path, text in texts.items():
        part = Path(f'{path}.part')
        part.write_text(text)
        os.replace(part, path)
