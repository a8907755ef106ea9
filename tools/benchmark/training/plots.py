"""Figures of speed and memory."""

import pandas

from shared import output
from shared.results import OK, OUT_OF_MEMORY

from .trial import file_name, short_name


def write_plots(rows, folder):
    """Draw what the rows have something for; yield the files.

    Args:
        rows (list[dict]): Rows of trials.
        folder (Path): Place of the figures, as png.

    Yields:
        Path: A file.
    """
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

    Of the batch and image size that most of them have trained with.
    """
    trained = rows[rows.result == OK]
    if trained.empty:
        return None
    sizes = list(zip(trained.batch_size, map(tuple, trained.image_size)))
    size = max(sizes, key=lambda size: (sizes.count(size), size))
    trained = trained[[other == size for other in sizes]]
    figure, (axes,) = output.make_figure()
    for shift, key in ((-0.2, 'activations_mib'), (0.2, 'peak_mib')):
        # Without a GPU there is no peak.
        heights = trained[key].astype(float).fillna(0)
        places = [place + shift for place in range(len(trained))]
        axes.bar(places, heights, 0.4, label=key.removesuffix('_mib'))
    axes.set_xticks(range(len(trained)), trained.system, rotation=20)
    batch, (height, width) = size
    axes.set(ylabel=f'MiB, batch {batch} of {height}x{width}')
    axes.legend()
    return figure


def plot_timeline(rows):
    """Memory through one step, or None if no row has a timeline."""
    if 'samples' not in rows or not rows.samples.notna().any():
        return None
    figure, (axes,) = output.make_figure()
    for row in rows[rows.samples.notna()].itertuples():
        label = f'{row.system}, batch {row.batch_size}'
        style = dict(drawstyle='steps-post', linewidth=1)
        axes.plot(*zip(*row.samples), label=label, **style)
    axes.set(xlabel='host time in the step, ms', ylabel='allocated, MiB')
    axes.legend()
    return figure
