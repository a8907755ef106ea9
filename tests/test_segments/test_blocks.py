"""Blocks that a level makes segments of."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import mmactnn
from mmactnn.segments import find_segments, is_segment


class Block(nn.Module):
    """Block of a transformer, without attention."""

    def __init__(self, norm=nn.LayerNorm, act=nn.GELU):
        super().__init__()
        self.norm = norm(32)
        self.first = nn.Linear(32, 64)
        self.act = act()
        self.second = nn.Linear(64, 32)

    def forward(self, x, scale=1.0):
        return x + scale * self.second(self.act(self.first(self.norm(x))))


class Model(nn.Module):
    """A stem, repeated blocks, and a head."""

    def __init__(self, block=Block, depth=3):
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_models(level='L3R', **kwargs):
    """An exact model and a converted one with its report."""
    torch.manual_seed(0)
    model = Model(**kwargs).train()
    twin = copy.deepcopy(model)
    return model, twin, mmactnn.convert_model(twin, level)


def test_training():
    model, twin, report = make_models()
    assert [item.name for item in report.segmented] == [
        'blocks.0',
        'blocks.1',
        'blocks.2',
    ]
    assert '3 Block run again, from 8 bit inputs' in str(report)
    assert {item.name for item in report.converted} == {'stem', 'head'}
    x = torch.randn(4, 64, 8)
    expected, output = model(x), twin(x)
    assert torch.equal(output, expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        bound = 0.02 if name.startswith('blocks') else 0.2
        assert (a.grad - b.grad).norm() < bound * a.grad.norm(), name


def test_memory():
    model, twin, _ = make_models(depth=4)
    x = torch.randn(4, 64, 8)
    with mmactnn.measure_activations(twin) as meter:
        twin(x)
    with mmactnn.measure_activations(model) as plain:
        model(x)
    assert meter.exact_bytes == plain.saved_bytes
    assert meter.ratio > 20


def test_elsewhere_it_is_the_parent():
    model, twin, _ = make_models()
    x = torch.randn(2, 64, 8)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    model.eval(), twin.eval()
    assert torch.equal(twin(x), model(x))
    block = twin.blocks[0]
    assert isinstance(block, Block) and type(block).__name__ == 'Block'
    assert inspect.signature(block.forward) == inspect.signature(
        model.blocks[0].forward
    )
    exported = torch.export.export(twin, (x,)).module()
    assert torch.equal(exported(x), model(x))


def test_copies_and_pickles():
    _, twin, _ = make_models()
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert all(map(is_segment, other.blocks))
        x = torch.randn(2, 64, 8)
        with mmactnn.measure_activations(other) as meter:
            other(x).sum().backward()
        assert meter.ratio > 18


def test_revert():
    model, twin, _ = make_models()
    names = mmactnn.revert_model(twin)
    assert 'blocks.1' in names
    assert [type(m) for m in twin.modules()] == [
        type(m) for m in model.modules()
    ]


def test_levels_change():
    model, twin, _ = make_models('L3')
    kinds = [type(m) for m in twin.modules()]
    mmactnn.convert_model(twin, 'L3R')
    assert type(twin.blocks[0].first) is nn.Linear
    assert is_segment(twin.blocks[0])
    mmactnn.convert_model(twin, 'L3')
    assert [type(m) for m in twin.modules()] == kinds
    mmactnn.convert_model(twin, 'L3R')
    mmactnn.convert_model(twin, 'L0')
    assert not any(map(is_segment, twin.modules()))
    x = torch.randn(2, 64, 8)
    assert torch.equal(twin(x), model(x))


def test_rules_and_filters():
    level = dict(base='L3R', rules={'blocks.0': 6, 'blocks.1': None})
    _, twin, report = make_models(level)
    found = {item.name: item.bits for item in report.segmented}
    assert found == {'blocks.0': 6, 'blocks.2': 8}
    assert type(twin.blocks[1].first).__name__ == 'QLinear'
    report = mmactnn.convert_model(twin, 'L3R', exclude=['blocks.[01]'])
    assert [item.name for item in report.segmented] == ['blocks.2']
    report = mmactnn.convert_model(
        twin, dict(base='L3R', segment_bits=4), include=['blocks.*']
    )
    assert {item.bits for item in report.segmented} == {4}
    with pytest.raises(ValueError, match='segment_bits'):
        mmactnn.get_level(dict(segment_bits=9))


@pytest.mark.parametrize('depth, count', [(1, 0), (2, 2)])
def test_blocks_are_repeated(depth, count):
    assert len(find_segments(Model(depth=depth))) == count


def test_blocks_with_batch_normalisation_keep_codes():
    def block():
        return Block(norm=nn.BatchNorm1d)

    assert find_segments(Model(block)) == {}


def test_innermost_blocks_are_found():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.blocks(x)

    model = Model(Stage)
    assert list(find_segments(model)) == [
        f'blocks.{i}.blocks.{j}' for i in range(3) for j in range(2)
    ]


def test_transformer_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 3).train()
    twin = copy.deepcopy(model)
    report = mmactnn.convert_model(twin, 'L3R')
    assert len(report.segmented) == 3
    x = torch.randn(4, 32, 32, requires_grad=True)
    outputs = []
    for module in (model, twin):
        torch.manual_seed(1)
        outputs.append(module(x * 1))
    assert torch.equal(*outputs)
    target = torch.randn(4, 32, 32)
    exact, found = (
        torch.autograd.grad((output * target).sum(), list(module.parameters()))
        for output, module in zip(outputs, (model, twin))
    )
    for a, b in zip(exact, found):
        assert (a - b).norm() < 0.05 * a.norm() + 1e-4
