"""Spares MMEngine what takes longer than short trainings."""

import functools
from types import SimpleNamespace

import pytest
from mmengine.fileio import load
from mmengine.utils.dl_utils import collect_env
from mmengine.visualization import Visualizer

# What compilers there are, say, as runners log it.
describe_environment = functools.cache(collect_env)


@functools.cache
def _make_figure(options):
    return _initialize_fig(None, dict(options))


_initialize_fig = Visualizer._initialize_fig


def quick_mmengine(patch: pytest.MonkeyPatch) -> None:
    """Make configs and datasets quick in this process.

    Runners print and save their configs several times, and format them for
    it. Whatever inherits from a toolbox looks for its base in all metafiles
    of the toolbox, about a hundred, which are parsed anew every time. Datasets
    collect the garbage of all that was ever imported. And each runner starts
    compilers to log their versions, and makes two figures to draw in.

    Args:
        patch (pytest.MonkeyPatch): Undoes it.
    """
    patch.setattr(
        'yapf.yapflib.yapf_api.FormatCode',
        lambda text, **options: (text, False),
    )
    patch.setattr('mmengine.config.utils.load', functools.cache(load))
    patch.setattr(
        'mmengine.dataset.base_dataset.gc',
        SimpleNamespace(collect=lambda: None),
    )
    for module in ('mmengine.runner.runner', 'mmengine._strategy.base'):
        patch.setattr(
            f'{module}.collect_env', lambda: dict(describe_environment())
        )
    patch.setattr(
        Visualizer,
        '_initialize_fig',
        lambda self, options: _make_figure(tuple(options.items())),
    )
