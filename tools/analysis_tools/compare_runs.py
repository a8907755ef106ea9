"""Compares an exact and a compressed run of one config.

``python tools/analysis_tools/compare_runs.py EXACT_WORK_DIR OURS_WORK_DIR``
reads the scalars that both runs logged. The exact run is the same config at
level L0: its hook keeps nothing compressed but logs the same quantities.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

# One logged line is a noisy sample of loss and time.
LAST_LINES = 10


@dataclass(frozen=True)
class Run:
    """What one run logged.

    Attributes:
        path (Path): File the scalars were read from.
        train (list[dict]): Logged training iterations, in order.
        val (list[dict]): Logged evaluations, in order.
    """

    path: Path
    train: list[dict]
    val: list[dict]

    def last(self, key: str) -> float:
        """The value of a training scalar that was logged last."""
        return self._values(self.train, key)[-1]

    def highest(self, key: str) -> float:
        """The highest logged value of a training scalar."""
        return max(self._values(self.train, key))

    def final_mean(self, key: str) -> float:
        """The mean of a training scalar over the last logged lines."""
        return fmean(self._values(self.train, key)[-LAST_LINES:])

    def final_metric(self, key: str) -> float:
        """The value of a metric at the last evaluation."""
        return self._values(self.val, key)[-1]

    def _values(self, lines: list[dict], key: str) -> list[float]:
        values = [line[key] for line in lines if key in line]
        if not values:
            logged = sorted({name for line in lines for name in line})
            raise KeyError(
                f'{self.path} holds no {key!r}; it holds '
                f'{", ".join(logged) or "no such lines at all"}'
            )
        return values


def read_run(work_dir: Path) -> Run:
    """Read the newest run in a work directory.

    Args:
        work_dir (Path): Work directory of a training.

    Returns:
        Run: Its scalars.

    Raises:
        FileNotFoundError: If no run in the directory has logged scalars.
    """
    # The runs' directories are named by their time.
    paths = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not paths:
        raise FileNotFoundError(
            f'no */vis_data/scalars.json in {work_dir}: expected the work '
            'directory of a training that has logged at least one line'
        )
    lines = [json.loads(line) for line in paths[-1].read_text().splitlines()]
    return Run(
        path=paths[-1],
        train=[line for line in lines if 'loss' in line],
        val=[line for line in lines if 'loss' not in line],
    )


def compare(exact: Run, ours: Run) -> Table:
    """Tabulate what both runs kept, took and reached.

    Args:
        exact (Run): The exact run.
        ours (Run): The compressed run.

    Returns:
        Table: One row for each quantity.

    Raises:
        KeyError: If a run has not logged one of the quantities.
    """
    rows = [
        ('activations kept (MiB)', '.1f', 'actnn/saved_mib', Run.last),
        ('ratio, whole model', '.2f', 'actnn/ratio', Run.last),
        ('ratio, its Q layers', '.2f', 'actnn/layers_ratio', Run.last),
        ('peak memory (MiB)', '.1f', 'actnn/peak_mib', Run.highest),
        ('final loss', '.4f', 'loss', Run.final_mean),
        ('time per iteration (s)', '.3f', 'time', Run.final_mean),
        ('bbox mAP', '.3f', 'coco/bbox_mAP', Run.final_metric),
    ]
    table = Table()
    table.add_column('')
    table.add_column('exact', justify='right')
    table.add_column('compressed', justify='right')
    for title, digits, key, value in rows:
        table.add_row(
            title, *(format(value(run, key), digits) for run in (exact, ours))
        )
    return table


def main(argv: list[str] | None = None) -> None:
    """Print the table of two work directories."""
    parser = argparse.ArgumentParser(
        description='Compare an exact and a compressed run of one config'
    )
    parser.add_argument(
        'exact', type=Path, metavar='EXACT_WORK_DIR', help='run at level L0'
    )
    parser.add_argument(
        'ours', type=Path, metavar='OURS_WORK_DIR', help='compressed run'
    )
    args = parser.parse_args(argv)
    Console().print(compare(read_run(args.exact), read_run(args.ours)))


if __name__ == '__main__':
    main()
