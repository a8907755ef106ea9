"""Figures of what was measured."""

import itertools
from collections import Counter

from .trial import OK, OUT_OF_MEMORY


def require_matplotlib():
    """Check that figures can be drawn.

    Raises:
        RuntimeError: If matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            'plots need matplotlib, which is not installed: '
            'pip install "mmactnn[benchmark]"'
        ) from error


def write_plots(rows, folder):
    """Draw every figure that the rows have something for.

    Args:
        rows (list[dict]): Rows of :class:`training.report.Results`.
        folder (Path): Where to write the figures, as png.

    Returns:
        list[Path]: The files.

    Raises:
        RuntimeError: If matplotlib is not installed.
    """
    require_matplotlib()
    written = []
    by_model = itertools.groupby(sorted(rows, key=_model), _model)
    for model, group in by_model:
        group = list(group)
        for kind, plot in _PLOTS.items():
            figure = plot(group)
            if figure is None:
                continue
            figure.axes[0].set_title(model)
            path = folder / f'{_file_name(model)}_{kind}.png'
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def plot_throughput(rows):
    """Throughput over the batch size; crosses where memory ran out.

    Args:
        rows (list[dict]): Rows of one model.

    Returns:
        Figure, optional: The figure, if any row has trained.
    """
    if not _trained(rows):
        return None
    figure, axes = _make_figure()
    for number, (label, group) in enumerate(_by_system(rows)):
        color = f'C{number}'
        trained = sorted(_trained(group), key=lambda row: row['batch_size'])
        sizes = [row['batch_size'] for row in trained]
        speeds = [row['images_per_s'] for row in trained]
        axes.plot(sizes, speeds, 'o-', color=color, label=label)
        failed = [
            row['batch_size']
            for row in group
            if row['result'] == OUT_OF_MEMORY
        ]
        if failed:
            last = speeds[-1] if speeds else 0
            axes.plot(min(failed), last, 'x', color=color, markersize=10)
    axes.set(xlabel='batch size (x: out of memory)', ylabel='images/s')
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def plot_memory(rows):
    """Activations and peak of every system, side by side.

    Args:
        rows (list[dict]): Rows of one model. Those of the batch and image
            size that most systems have trained with are drawn.

    Returns:
        Figure, optional: The figure, if any row has trained.
    """
    trained = _trained(rows)
    if not trained:
        return None
    counts = Counter(map(_size, trained))
    size = max(counts, key=lambda size: (counts[size], size))
    trained = [row for row in trained if _size(row) == size]
    figure, axes = _make_figure()
    width = 0.4
    for offset, key, label in (
        (-width / 2, 'activations_mib', 'activations'),
        (width / 2, 'peak_mib', 'peak'),
    ):
        # Without a GPU there is no peak.
        heights = [row[key] or 0 for row in trained]
        places = [number + offset for number in range(len(trained))]
        axes.bar(places, heights, width, label=label)
    axes.set_xticks(
        range(len(trained)), [row['system'] for row in trained], rotation=20
    )
    batch, (height, width) = size
    axes.set(ylabel=f'MiB, batch {batch} of {height}x{width}')
    axes.legend()
    return figure


def plot_timeline(rows):
    """Memory through one training step.

    Args:
        rows (list[dict]): Rows of one model.

    Returns:
        Figure, optional: The figure, if any row has a timeline.
    """
    rows = [row for row in rows if row.get('samples')]
    if not rows:
        return None
    figure, axes = _make_figure()
    for row in rows:
        times, heights = [], []
        for ms, _, now, most in row['samples']:
            # Up to the most since the sample before, and down to what is left.
            times += [ms, ms]
            heights += [most, now]
        label = f'{row["system"]}, batch {row["batch_size"]}'
        axes.plot(times, heights, label=label, linewidth=1)
    axes.set(xlabel='host time in the step, ms', ylabel='allocated, MiB')
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


_PLOTS = dict(
    throughput=plot_throughput, memory=plot_memory, timeline=plot_timeline
)


def _make_figure():
    # Not pyplot: there need not be a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    return figure, figure.add_subplot()


def _trained(rows):
    return [row for row in rows if row['result'] == OK]


def _by_system(rows):
    """Yield label and rows of each system, in the order of measurement."""
    labels = dict.fromkeys(map(_system, rows))
    for label in labels:
        yield label, [row for row in rows if _system(row) == label]


def _system(row):
    return row['system']


def _model(row):
    return row['model']


def _size(row):
    return row['batch_size'], tuple(row['image_size'])


def _file_name(model):
    name = model.rpartition('/')[2].removesuffix('.py')
    return ''.join(c if c.isalnum() or c in '-_.' else '_' for c in name)
