"""Tests of tests/support/torchvision_stub.py."""

import importlib.util
import subprocess
import sys

import pytest
from support.tools import ROOT
from support.torchvision_stub import TORCHVISION_DIR

SCRIPT = """
from support.torchvision_stub import make_torchvision_importable

make_torchvision_importable()
from mmpretrain.models import MoCo
"""


@pytest.mark.skipif(
    importlib.util.find_spec('mmpretrain') is None
    or not (
        TORCHVISION_DIR.exists() or importlib.util.find_spec('torchvision')
    ),
    reason='mmpretrain or torchvision is not installed',
)
def test_mmpretrain_imports():
    # In a process of its own: here something may have imported it already.
    run = subprocess.run(
        [sys.executable, '-c', SCRIPT],
        cwd=ROOT / 'tests',
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
