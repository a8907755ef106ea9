"""Spares torch what takes longer than small tests."""

import pytest
import torch


def quick_torch(patch: pytest.MonkeyPatch) -> None:
    """Make :func:`torch.manual_seed` quick where there is no accelerator.

    For each kind of them, whether it is there or not, it keeps the seed for
    later along with a text of the whole stack: a millisecond, which thousands
    of tests begin with, and most cases within them.

    Args:
        patch (pytest.MonkeyPatch): Undoes it.
    """
    if torch.accelerator.is_available():
        return
    for name in ('cuda', 'mtia', 'xpu'):
        patch.setattr(f'torch.{name}.manual_seed_all', lambda seed: None)
