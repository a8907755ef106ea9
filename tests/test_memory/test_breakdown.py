"""Breakdown by parts of a model against the count of the meter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmactnn import convert_model, measure_activations
from mmactnn.codes.units import MIB
from mmactnn.memory import Breakdown, Category, Entry, Locator

N, C, SIZE = 4, 8, 32
NUMEL = N * C * SIZE * SIZE


class Model(nn.Module):
    """Compressed layers, one that is not, a function and a loss."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.relu = nn.ReLU()
        self.shrink = nn.Softshrink()
        self.drop = nn.Dropout()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.shrink(self.relu(self.conv(x)))
        x = torch.exp(x)
        return self.pool(self.drop(x))


def break_down(model, x, level=None, dtype=None):
    """Breakdown and meter of one forward pass with a loss."""
    report = None if level is None else convert_model(model, level)
    autocast = torch.autocast('cpu', dtype, enabled=dtype is not None)
    with autocast, measure_activations(model, Locator(model)) as meter:
        output = model(x)
        loss = F.mse_loss(output, torch.zeros_like(output))
    del output, loss
    return Breakdown.of(meter, model, report), meter


@pytest.fixture
def x():
    return torch.randn(N, C, SIZE, SIZE)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize('level', [None, 'L0', 'L1', 'L2', 'L3'])
def test_parts_add_up(level, dtype, x):
    whole, meter = break_down(Model(), x, level, dtype)
    assert whole.exact_bytes == meter.exact_bytes > 0
    assert whole.kept_bytes == meter.saved_bytes > 0
    assert sum(map(whole.kept_in, Category)) == meter.saved_bytes
    assert whole.ratio == meter.ratio


def test_codes_in_place_of_a_mask(x):
    """Layers that round the tensors that they keep."""
    from mmcv.cnn import ConvModule

    block = ConvModule(C, C, 1)
    whole, _ = break_down(block, x, dict(base='L2', conv=2, rectified=3))
    found = {entry.module: entry.category for entry in whole.entries}
    assert found['activate'] is Category.COMPRESSED


def test_entries(x):
    whole, _ = break_down(Model(), x, dict(base='L2', conv=2))
    found = {(e.module, e.category): e for e in whole.entries}
    left, loss = Category.LEFT, Category.LOSS
    full = NUMEL * 4
    codes = NUMEL * 2 // 8 + NUMEL // 256 * 4

    def sizes(*key):
        entry = found.pop(key)
        return entry.exact_bytes, entry.kept_bytes

    assert sizes('conv', Category.COMPRESSED) == (full, codes)
    # Torch keeps ReLU's output, which the backward pass of Softshrink needs,
    # too: it counts for the first of them, where it is a mask.
    assert sizes('relu', Category.EXACT) == (full, NUMEL // 8)
    shrink, exp = found['shrink', left], found['', left]
    assert sizes('shrink', left) == (0, full)
    assert shrink.cause == 'Softshrink'
    assert shrink.note == 'no compressed layer of this type'
    assert sizes('', left) == (full, full)
    assert exp.cause.startswith('test_breakdown.py:')
    assert exp.note == 'x = torch.exp(x)'
    assert sizes('drop', Category.EXACT) == (full, 0)
    # The input, and 64 bits an output; 4 bits an output.
    outputs = NUMEL // 4
    assert sizes('pool', Category.EXACT) == (
        full + 8 * outputs,
        outputs // 2,
    )
    lost = sizes('', loss)
    assert lost[0] == lost[1] > 0
    assert not found

    exact = whole.exact_bytes - lost[0]
    kept = whole.kept_bytes - lost[1]
    assert whole.left_share == pytest.approx(2 * full / exact)
    assert whole.left_share_of_kept == pytest.approx(2 * full / kept)
    # Softshrink and the line of the exponential keep as much.
    assert [size for _, size in whole.causes(left)] == [full, full]
    mib = f'{2 * full / MIB:.1f} of {exact / MIB:.1f} MiB'
    assert str(whole).startswith(f'left uncompressed: {mib} (')
    assert 'Softshrink' in str(whole)


def test_largest_first(x):
    whole, _ = break_down(Model(), x, 'L3')
    kept = [entry.kept_bytes for entry in whole.entries]
    assert kept == sorted(kept, reverse=True)


def test_exact_layers_say_so(x):
    model = Model()
    whole, _ = break_down(model, x, 'L0')
    notes = {e.module: e.note for e in whole.entries}
    assert notes['conv'] == 'exact at this level'
    assert whole.left_share == 1
    report = convert_model(model, 'L3', exclude=['conv'])
    assert [item.reason for item in report.left if item.name == 'conv'] == [
        'excluded'
    ]


def test_reasons_of_the_conversion(x):
    model = nn.Sequential(nn.Conv2d(C, C, 3), nn.MaxPool2d(17))
    whole, _ = break_down(model, x, 'L3')
    notes = {e.module: e.note for e in whole.entries}
    assert notes['1'] == 'window of 289 taps, 256 at most'


def test_nothing_kept():
    whole = Breakdown(())
    assert whole.ratio == 1
    assert whole.left_share == whole.left_share_of_kept == 0
    assert str(whole) == (
        'left uncompressed: 0.0 of 0.0 MiB (0.0%), losses (0.0 MiB) apart'
    )


def test_many_causes():
    entries = tuple(
        Entry('m', f'Layer{i}', '', '', Category.LEFT, MIB, MIB, '')
        for i in range(5)
    )
    assert str(Breakdown(entries)).endswith(
        ': Layer0 1.0, Layer1 1.0, Layer2 1.0, ...'
    )
