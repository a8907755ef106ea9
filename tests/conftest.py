"""Fixtures that all tests share."""

import random

import numpy as np
import pytest
import torch


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
