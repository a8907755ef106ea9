"""Figures of speed and memory."""

import pandas

from shared import output
from shared.results import OK, OUT_OF_MEMORY

from .trial import file_name, short_name


def write_plots(rows, folder):
    """Draw all figures that rows have data for, as png; yield their paths."""
    for model, group in pandas.DataFrame(rows).groupby('model', sort=False):
        for plot in (plot_throughput, plot_memory, plot_timeline):
            figure = plot(group)
            if figure is None:
                continue
            figure.axes[0].set_title(model)
            name = file_name(short_name(model).removesuffix('.py'))
            kind = plot.__name__.removeprefix('plot_')
            path = folder / f'{name}_{kind}.png'
            figure.savefig(path, dpi=150)
            yield path


def plot_throughput(rows):
    """Throughput of a model over the batch size, or None if none trained."""
    if not (rows.result == OK).any():
        return None
    figure, (axes,) = output.make_figure()
    for number, (system, group) in enumerate(
        rows.groupby('system', sort=False)
    ):
        color = f'C{number}'
        trained = group[group.result == OK].sort_values('batch_size')
        sizes, speeds = trained.batch_size, trained.images_per_s
        axes.plot(sizes, speeds, 'o-', color=color, label=system)
        failed = group.batch_size[group.result == OUT_OF_MEMORY]
        if len(failed):
            last = speeds.iloc[-1] if len(speeds) else 0
            axes.plot(failed.min(), last, 'x', color=color, markersize=10)
    axes.set(xlabel='batch size (x: out of memory)', ylabel='images/s')
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_memory(rows):
    """Activations and peak of systems, or None if none trained.

    For the batch and image size with which most of them trained.
    """
    trained = rows[rows.result == OK]
    if trained.empty:
        return None
    sizes = list(zip(trained.batch_size, map(tuple, trained.image_size)))
    size = max(sizes, key=lambda size: (sizes.count(size), size))
    trained = trained[[other == size for other in sizes]]
    figure, (axes,) = output.make_figure()
    bars = trained.set_index('system')[['activations_mib', 'peak_mib']]
    # There is no peak without a GPU.
    bars.astype(float).fillna(0).plot.bar(ax=axes, rot=20, width=0.8)
    batch, (height, width) = size
    axes.set(xlabel='', ylabel=f'MiB, batch {batch} of {height}x{width}')
    return figure


def plot_timeline(rows):
    """Memory through one step, or None if there are no timelines."""
    if 'samples' not in rows or rows.samples.isna().all():
        return None
    figure, (axes,) = output.make_figure()
    for row in rows.dropna(subset='samples').itertuples():
        label = f'{row.system}, batch {row.batch_size}'
        style = dict(drawstyle='steps-post', linewidth=1)
        axes.plot(*zip(*row.samples), label=label, **style)
    axes.set(xlabel='host time in the step, ms', ylabel='allocated, MiB')
    axes.legend()
    return figure
