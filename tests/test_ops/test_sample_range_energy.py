"""Range energy of samples against torch."""

import math

import pytest
import torch
from support.opcheck import opcheck
from support.pairs import case, in_turn

from mmactnn import ops
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((0, 4), (3, 0), (1,), (5, 3), (2, 256), (3, 513), (2, 7, 9, 11))


def make(shape, dtype, device):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).to(device, dtype)


def check(x, group_size):
    energies = ops.sample_range_energy(x, group_size)
    assert energies.dtype == torch.float32 and energies.shape == x.shape[:1]
    torch.testing.assert_close(
        energies.cpu(), reference.sample_range_energy(x.cpu(), group_size)
    )
    assert torch.equal(energies, ops.sample_range_energy(x, group_size))
    return energies


@in_turn(by='dtype', shape=SHAPES, dtype=DTYPES)
def test_equals_reference(shape, dtype, device):
    for group_size in ops.GROUP_SIZES:
        with case(group_size=group_size):
            check(make(shape, dtype, device), group_size)


def test_closed_form(device):
    x = torch.zeros(2, 100, device=device)
    x[0, 3], x[0, 70], x[1, 99] = 2.0, -3.0, 1.0
    # Groups of 64 and of 36 elements.
    assert ops.sample_range_energy(x, 64).tolist() == [64 * 4 + 36 * 9, 36.0]


def test_channels_last_is_read_in_memory_order(device):
    x = make((3, 10, 7, 5), torch.float32, device)
    x = x.to(memory_format=torch.channels_last)
    energies = check(x, 64)
    assert torch.equal(
        energies, ops.sample_range_energy(x.permute(0, 2, 3, 1), 64)
    )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_nan_and_inf_do_not_count(dtype, device):
    x = make((4, 300), dtype, device)
    clean = x.clone()
    clean[0, 5] = clean[0, 6]
    x[0, 5] = math.nan
    x[1, :64] = math.inf  # a group without a finite value
    clean[1, :64] = 0
    x[2, 256:] = -math.inf
    clean[2, 256:] = 1
    assert torch.equal(check(x, 64), check(clean, 64))


def test_sums_stay_finite(device):
    x = torch.zeros(3, 1024, device=device)
    x[0, 0], x[0, 1] = 3e38, -3e38
    x[1, ::64] = 2e18
    largest = torch.finfo(torch.float32).max
    assert check(x, 64).tolist() == [largest, largest, 0.0]


def test_many_groups_in_few_rows(device):
    x = make((2, 2**20 + 3), torch.float16, device)
    check(x, 64)


def test_many_rows(device):
    check(make((70000, 9), torch.float32, device), 64)


def test_opcheck(device):
    opcheck(
        torch.ops.mmactnn.sample_range_energy.default,
        (make((3, 5, 30), torch.float32, device), 64),
    )


def test_unknown_input(device):
    x = torch.zeros(1, 8, device=device)
    with pytest.raises(ValueError, match='512, got 100'):
        ops.sample_range_energy(x, 100)
    with pytest.raises(TypeError, match='float64'):
        ops.sample_range_energy(x.double())
    with pytest.raises(ValueError, match='at least one dimension'):
        ops.sample_range_energy(x[0, 0])
