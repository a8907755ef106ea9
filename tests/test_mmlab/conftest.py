"""Fixtures of the tests with MMEngine."""

from collections import OrderedDict

import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def no_scope(monkeypatch):
    """Every test starts without a default scope, and leaves none behind."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())
