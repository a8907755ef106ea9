"""Prints what was compared."""

from rich.table import Table

from .run import OK


def make_table(summaries):
    """A table of all configs for the terminal.

    Args:
        summaries (list[Summary]): From :func:`comparison.summary.summarize`.

    Returns:
        Table: A row for each config and level: the metric of each seed, their
        mean, the difference from the mean of the first level, and what was
        kept for the backward pass.
    """
    seeds = sorted(
        {seed for s in summaries for seed in (*s.seeds, *s.left_out)}
    )
    table = Table()
    for name in ('config', 'metric', 'at', 'level'):
        table.add_column(name)
    for name in (*(f'seed {seed}' for seed in seeds), 'mean', 'difference'):
        table.add_column(name, justify='right')
    table.add_column('activations, MiB', justify='right')
    for summary in summaries:
        first = summary.rows[summary.levels[0], summary.seeds[0]]
        at = f'{first["unit"]} {summary.step}'
        for level in summary.levels:
            values = [summary.value(level, seed) for seed in seeds]
            mean = summary.mean(level)
            difference = None
            if mean is not None and level != summary.levels[0]:
                difference = mean - summary.mean(summary.levels[0])
            row = summary.rows[level, summary.seeds[0]]
            table.add_row(
                summary.config,
                first['metric'] or '',
                '' if summary.step is None else at,
                level,
                *(_format(value, '.3f') for value in (*values, mean)),
                _format(difference, '+.3f'),
                _format(row['saved_mib'], '.1f'),
            )
        table.add_section()
    return table


def describe(row):
    """A run in a line.

    Args:
        row (dict): Row of :class:`comparison.results.Results`.

    Returns:
        str: Name and seed, what has become of it and what it has reached.
    """
    text = f'{row["config"]} {row["level"]} seed {row["seed"]}: '
    text += row['result']
    if row.get('message'):
        text += f' ({row["message"]})'
    if row.get('evaluations'):
        step, value = row['evaluations'][-1]
        text += f', {row["metric"]} {value:.3f} at {row["unit"]} {step}'
    return text


def unfinished(rows):
    """Lines that say which runs were not trained to the end.

    Args:
        rows (list[dict]): Rows of :class:`comparison.results.Results`.

    Returns:
        list[str]: A line for each.
    """
    return [describe(row) for row in rows if row['result'] != OK]


def _format(value, spec):
    return '' if value is None else format(value, spec)
