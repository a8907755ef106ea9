"""Frozen blocks of models in training."""

import copy

import pytest
import torch
from support.blocks import BLOCKS, make_block
from support.layers import assert_same_bits, exact_numerics
from support.live import LiveBytes
from support.pairs import in_turn
from torch import nn

from mmactnn import convert_model
from mmactnn.ops import frozen_norm


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the inputs of frozen normalisations that run in one pass."""
    seen = []
    run = frozen_norm.frozen_norm_act_

    def counting(input, *args):
        seen.append(tuple(input.shape))
        return run(input, *args)

    monkeypatch.setattr('mmactnn.layers.norm.frozen_norm_act_', counting)
    return seen


def freeze(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.eval().requires_grad_(False)


def make_frozen(name, device):
    torch.manual_seed(1)
    block = freeze(make_block(name)).to(device)
    stock = copy.deepcopy(block)
    convert_model(block, 'L3')
    return block, stock, torch.randn(4, 16, 9, 7, device=device)


@pytest.mark.parametrize(
    'name',
    [n for n in BLOCKS if 'bottleneck' in n.lower() or 'basic' in n.lower()],
)
@in_turn(channels_last=[False, True])
def test_values(name, channels_last, device, calls):
    block, stock, x = make_frozen(name, device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        block.to(memory_format=torch.channels_last)
        stock.to(memory_format=torch.channels_last)
    with exact_numerics():
        found, expected = block(x), stock(x)
    assert found.stride() == expected.stride()
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ('name', 'norms'),
    [('mmdet bottleneck', 3), ('mmdet bottleneck, stride', 4)],
)
def test_each_norm_runs_with_its_epilogue(name, norms, device, calls):
    block, _, x = make_frozen(name, device)
    block(x)
    assert len(calls) == norms
    calls.clear()
    with torch.no_grad():
        block(x)
    # In validation torch's layers run.
    assert not calls


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(dtype, device, calls):
    block, stock, x = make_frozen('mmdet bottleneck, stride', device)
    calls.clear()
    with torch.autocast(device.type, dtype):
        found, expected = block(x), stock(x)
    assert found.dtype == expected.dtype
    assert len(calls) == 4
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    'change',
    [
        lambda block: block.conv1.register_forward_hook(lambda *_: None),
        lambda block: block.bn1.register_forward_hook(lambda *_: None),
        lambda block: block.relu.register_forward_hook(lambda *_: None),
        lambda block: block.bn1.train(),
        lambda block: block.bn1.requires_grad_(),
        lambda block: setattr(block, 'relu', nn.LeakyReLU(0.5)),
    ],
)
def test_hooks_and_changes(change, device, calls):
    block, stock, x = make_frozen('mmdet bottleneck', device)
    for module in (block, stock):
        change(module)
    with exact_numerics():
        assert torch.allclose(block(x), stock(x), atol=1e-4, rtol=1e-4)
    assert len(calls) < 3


def test_inputs_with_gradients(device, calls):
    block, stock, x = make_frozen('mmdet bottleneck', device)
    grads = []
    for module in (block, stock):
        leaf = x.clone().requires_grad_()
        with exact_numerics():
            module(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert not calls
    assert torch.allclose(*grads, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    'shortcut',
    [
        nn.AvgPool2d(3, 1, 1),
        nn.Sequential(nn.BatchNorm2d(16), nn.Identity()),
        nn.Sequential(nn.BatchNorm2d(16), nn.BatchNorm2d(16)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(16)),
    ],
    ids=['pool', 'norm', 'norms', 'pool and norm'],
)
def test_shortcut_without_convolution(shortcut, device, calls):
    _, stock, x = make_frozen('mmdet bottleneck', device)
    stock.downsample = freeze(copy.deepcopy(shortcut)).to(device)
    block = copy.deepcopy(stock)
    convert_model(block, 'L3')
    with exact_numerics():
        assert torch.allclose(block(x), stock(x), atol=1e-4, rtol=1e-4)
    assert len(calls) == 3


def test_input_is_unchanged(device):
    block, _, x = make_frozen('mmdet bottleneck', device)
    before = x.clone()
    block(x)
    assert_same_bits(x, before)


def test_no_more_memory_than_torch():
    block, stock, _ = make_frozen('mmdet bottleneck', torch.device('cpu'))
    x = torch.randn(4, 16, 64, 64)
    peaks = []
    for module in (block, stock):
        with LiveBytes() as live:
            module(x)
        peaks.append(live.peak)
    assert peaks[0] <= peaks[1]


def test_stem(calls):
    """The stem is frozen within a module that is trained."""
    from mmdet.models.backbones import ResNet

    torch.manual_seed(1)
    net = ResNet(18, base_channels=8, frozen_stages=1, norm_eval=True)
    net.train()
    stock = copy.deepcopy(net)
    convert_model(net, 'L3')
    x = torch.randn(2, 3, 32, 32)
    with exact_numerics():
        for found, expected in zip(net(x), stock(x)):
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    # The stem, and two blocks of two.
    assert len(calls) == 1 + 4
    calls.clear()
    seen = []
    net.conv1.register_forward_hook(lambda m, i, o: seen.append(o))
    net(x)
    assert len(calls) == 4
    assert (seen[0] < 0).any()
