"""Spares MMEngine's configs what takes longer than short trainings."""

import functools

import pytest
from mmengine.fileio import load


def quick_configs(patch: pytest.MonkeyPatch) -> None:
    """Make configs quick in this process.

    Runners print and save their configs several times, and format them for
    it. Whatever inherits from a toolbox looks for its base in all metafiles
    of the toolbox, about a hundred, which are parsed anew every time.

    Args:
        patch (pytest.MonkeyPatch): Undoes it.
    """
    patch.setattr(
        'yapf.yapflib.yapf_api.FormatCode',
        lambda text, **options: (text, False),
    )
    patch.setattr('mmengine.config.utils.load', functools.cache(load))
