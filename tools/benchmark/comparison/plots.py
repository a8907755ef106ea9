"""Curves of a comparison."""

from shared.output import make_figure


def plot(summary):
    """Losses and, if there are evaluations, metric over time.

    For each level the mean and the range of the seeds.
    """
    panels = [(summary.losses, 'iteration', 'training loss')]
    if len(summary.evaluations):
        panels.append((summary.evaluations, summary.unit, summary.metric))
    figure, all_axes = make_figure(len(panels), (4.5, 3.6))
    for axes, (curves, x_label, y_label) in zip(all_axes, panels):
        for level in summary.saved_mib:
            values, steps = curves[level], curves.index
            mean = values.mean(axis=1)
            (line,) = axes.plot(steps, mean, label=level, linewidth=1)
            if len(steps) < 10:
                line.set(marker='o', markersize=4)
                axes.set_xticks(steps)
            low, high = values.min(axis=1), values.max(axis=1)
            band = axes.fill_between(steps, low, high, alpha=0.2)
            # With a line, so that the range of a single step is visible.
            band.set(color=line.get_color(), linewidth=1)
        axes.set(xlabel=x_label, ylabel=y_label)
    seeds = ', '.join(map(str, summary.seeds))
    all_axes[0].legend(title=f'mean, range of seeds {seeds}')
    figure.suptitle(summary.config)
    return figure
