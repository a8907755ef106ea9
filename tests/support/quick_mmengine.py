"""Spares MMEngine what takes longer than short trainings."""

import functools
from types import SimpleNamespace

import pytest
from mmengine.fileio import load


def quick_mmengine(patch: pytest.MonkeyPatch) -> None:
    """Make configs and datasets quick in this process.

    Runners print and save their configs several times, and format them for
    it. Whatever inherits from a toolbox looks for its base in all metafiles
    of the toolbox, about a hundred, which are parsed anew every time. Datasets
    collect the garbage of all that was ever imported.

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
