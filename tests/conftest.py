"""Fixtures that all tests share."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tools import load_tool


@pytest.fixture(params=['cpu', 'cuda'])
def device(request) -> torch.device:
    """Every device that the tested code has kernels for."""
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start every test from the same random state."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(scope='session')
def digits_home(tmp_path_factory) -> Path:
    """A directory to run tools in: it holds a tiny set in ``data/digits``.

    The configs name their data relative to the working directory.
    """
    home = tmp_path_factory.mktemp('home')
    converter = load_tool('dataset_converters/digits.py')
    options = [str(home / 'data' / 'digits'), '--image-size', '64']
    options += ['--num-train', '16', '--num-val', '4']
    converter.make_dataset(converter.parse_args(options))
    return home
