"""Comparison of an exact and a compressed run of one config.

``python tools/analysis_tools/compare_runs.py EXACT_WORK_DIR OURS_WORK_DIR``
reads the scalars that both runs logged, before and after being resumed. The
exact run is the same config at level L0: its hook compresses nothing but
logs the same quantities. A dash stands for a quantity that a run did not log.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from run_log import RunLog, choose_metric

# One logged line is a noisy sample of loss and time.
LAST_LINES = 10

# Exit code for users' mistakes.
_USAGE = 2


def read_run(work_dir: Path) -> RunLog:
    """Read the run in a work directory.

    Args:
        work_dir (Path): Work directory of a training.

    Returns:
        RunLog: Its scalars.

    Raises:
        ValueError: If no training in the directory has logged scalars.
    """
    run = RunLog(work_dir)
    if not run.train:
        raise ValueError(
            f'{work_dir} must be the work directory of a training that has '
            'logged at least one line, got none in its */vis_data/*.json'
        )
    return run


def common_metric(runs: list[RunLog], named: str | None) -> str | None:
    """Choose the metric to compare.

    Args:
        runs (list[RunLog]): The runs.
        named (str | None): Name from the user.

    Returns:
        str | None: A metric that all runs have; None if there is none.

    Raises:
        ValueError: If a run lacks the named metric.
    """
    if named is None:
        first, *others = (run.metrics for run in runs)
        common = [n for n in first if all(n in names for names in others)]
        return choose_metric(common)
    for run in runs:
        if named not in run.metrics:
            raise ValueError(
                f'--metric must be in the evaluations of {run.work_dir}: '
                f'one of {", ".join(run.metrics) or "none"}, got {named!r}'
            )
    return named


def compare(runs: list[RunLog], metric: str | None) -> Table:
    """Tabulate memory, time and results of both runs.

    Args:
        runs (list[RunLog]): The exact and the compressed run.
        metric (str | None): Metric of the evaluations.

    Returns:
        Table: One row for each quantity.
    """
    # At the last common step: the loss of a longer training would be lower.
    end = min(max(run.train) for run in runs)

    def logged(run, key):
        steps = sorted(step for step in run.train if step <= end)
        lines = (run.train[step] for step in steps)
        return [line[key] for line in lines if key in line]

    def mean_of_last(values):
        return fmean(values[-LAST_LINES:])

    table = Table()
    table.add_column('')
    table.add_column('exact', justify='right')
    table.add_column('compressed', justify='right')
    for title, digits, key, reduce in (
        ('activations kept (MiB)', '.1f', 'actnn/saved_mib', lambda v: v[-1]),
        ('ratio, whole model', '.2f', 'actnn/ratio', lambda v: v[-1]),
        ('ratio, its Q layers', '.2f', 'actnn/layers_ratio', lambda v: v[-1]),
        ('peak memory (MiB)', '.1f', 'actnn/peak_mib', max),
        ('final loss', '.4f', 'loss', mean_of_last),
        ('time per iteration (s)', '.3f', 'time', mean_of_last),
    ):
        values = [logged(run, key) for run in runs]
        cells = (format(reduce(v), digits) if v else '-' for v in values)
        table.add_row(title, *cells)
    if metric is not None:
        curves = [run.curve(metric) for run in runs]
        common = curves[0].keys() & curves[1].keys()
        # Without a common step, the last one of each run.
        steps = [max(common or curve) for curve in curves]
        at = ' and '.join(map(str, dict.fromkeys(steps)))
        table.add_row(
            f'{metric}, {runs[0].unit} {at}',
            *(f'{curve[step]:.3f}' for curve, step in zip(curves, steps)),
        )
    return table


def notices(runs: list[RunLog], metric: str | None) -> list[str]:
    """Lines about quantities that the table omits.

    Args:
        runs (list[RunLog]): The exact and the compressed run.
        metric (str | None): Metric of the table.

    Returns:
        list[str]: The lines.
    """
    lines = [notice for run in runs for notice in run.notices]
    ends = [max(run.train) for run in runs]
    if len(set(ends)) > 1:
        lines.append(
            f'the runs end at iterations {ends[0]} and {ends[1]}: they are '
            f'compared up to {min(ends)}'
        )
    if metric is None:
        lines.append('the runs have no metric of an evaluation in common')
    return lines


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
    parser.add_argument(
        '--metric',
        help='number in the evaluations, such as coco/bbox_mAP (default: the '
        'usual one of the task, else the first that both have)',
    )
    args = parser.parse_args(argv)
    try:
        runs = [read_run(args.exact), read_run(args.ours)]
        metric = common_metric(runs, args.metric)
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(_USAGE) from None
    Console().print(compare(runs, metric))
    for notice in notices(runs, metric):
        print(notice, file=sys.stderr)


if __name__ == '__main__':
    main()
