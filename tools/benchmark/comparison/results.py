"""Keeps what runs have reached."""

import dataclasses
import json

from training.report import write_json

from .run import OK, UNFINISHED, Run


class Results:
    """Rows of runs, in a file that is complete at any time.

    ``results.json`` has a row a line and is read again.

    Attributes:
        rows (list[dict]): The settings of a run and what it has reached in
            each, in the order in which they were begun.

    Args:
        folder (Path): Where the file is.
    """

    def __init__(self, folder):
        self._path = folder / 'results.json'
        self.rows = []
        if self._path.exists():
            self.rows = json.loads(self._path.read_text())

    def begin(self, run):
        """Enter a run.

        Args:
            run (Run): The run.

        Returns:
            bool: Whether there is anything left to do.

        Raises:
            ValueError: If it is there with other settings. Its work directory
                is that of another training then.
        """
        row = self._find(run)
        if row is None:
            row = dict(dataclasses.asdict(run), result=UNFINISHED)
            self.rows.append(row)
            self._write()
        earlier = Run.from_dict(row)
        if earlier != run:
            raise ValueError(
                f'{self._path} holds {earlier}, got {run}: other settings '
                'need another folder'
            )
        return row['result'] != OK

    def end(self, run, figures):
        """Keep what a run has reached.

        Args:
            run (Run): A run that has begun.
            figures (dict): ``result`` and what
                :func:`comparison.scalars.read_figures` returns.

        Returns:
            dict: The row.
        """
        row = self._find(run)
        row.update(figures)
        self._write()
        return row

    def _find(self, run):
        # Runs of one name have one work directory.
        for row in self.rows:
            if Run.from_dict(row).name == run.name:
                return row
        return None

    def _write(self):
        write_json(self._path, self.rows)
