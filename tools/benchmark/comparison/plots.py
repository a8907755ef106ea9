"""Curves of what was compared."""

from training.plots import require_matplotlib


def write_plots(summaries, folder):
    """Draw losses and metric of every config.

    Args:
        summaries (list[Summary]): From :func:`comparison.summary.summarize`.
        folder (Path): Where to write the figures, as png.

    Returns:
        list[Path]: The files.

    Raises:
        RuntimeError: If matplotlib is not installed.
    """
    require_matplotlib()
    written = []
    for summary in summaries:
        path = folder / f'{summary.config}_accuracy.png'
        plot(summary).savefig(path, dpi=100)
        written.append(path)
    return written


def plot(summary):
    """Losses and, if there are evaluations, metric over time.

    Of each level the mean of the seeds and the band between the lowest and
    the highest of them, as far as all runs have come.

    Args:
        summary (Summary): Runs of a config.

    Returns:
        Figure: The figure.
    """
    # Not pyplot: there need not be a display.
    from matplotlib.figure import Figure

    row = summary.rows[summary.levels[0], summary.seeds[0]]
    panels = [('losses', 'iteration', 'training loss')]
    if summary.step is not None:
        panels.append(('evaluations', row['unit'], row['metric']))
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout='constrained')
    for axes, (key, x_label, y_label) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        for level in summary.levels:
            _draw(axes, level, *summary.curves(level, key))
        axes.set(xlabel=x_label, ylabel=y_label)
    seeds = ', '.join(map(str, summary.seeds))
    figure.axes[0].legend(title=f'mean, range of seeds {seeds}')
    figure.suptitle(summary.config)
    return figure


def _draw(axes, level, steps, curves):
    at_steps = list(zip(*curves))
    means = [sum(values) / len(values) for values in at_steps]
    (line,) = axes.plot(steps, means, label=level, linewidth=1)
    if len(steps) < 10:
        line.set(marker='o', markersize=4)
        axes.set_xticks(steps)
    axes.fill_between(
        steps,
        [min(values) for values in at_steps],
        [max(values) for values in at_steps],
        color=line.get_color(),
        alpha=0.2,
        # So that the band of a single step is seen, too.
        linewidth=1,
    )
