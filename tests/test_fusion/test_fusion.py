"""Fused blocks, against the same blocks unfused and in float64."""

import copy
import math
import pickle

import pytest
import torch
from support.blocks import BLOCKS, make_block
from support.chains import nodes
from support.layers import (
    FLOAT32_ERROR,
    assert_same_bits,
    exact_numerics,
    gradients,
    relative_error,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn

from mmactnn import (
    QBatchNorm2d,
    convert_model,
    measure_activations,
    revert_model,
)
from mmactnn.fusion import chain, is_fused

# Codes of 8 bits throughout.
FINE = dict(base='L2', conv=8, norm=8, rectified=8)
# As L3 for fused blocks, without bits that depend on earlier passes.
FIXED = dict(base='L2', conv=2, norm=2, rectified=3)
RANDOM = ('mmpretrain drop path',)


def make_input(device='cpu', channels_last=False, dtype=torch.float32):
    x = torch.randn(4, 16, 9, 7, device=device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def run(block, x):
    torch.manual_seed(1)  # for dropped paths
    with exact_numerics():
        torch.manual_seed(2)
        return gradients(block, x, None if x is None else _grad(block, x))


def _grad(block, x):
    size = copy.deepcopy(block).eval()(x[:1]).shape[1:]
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(len(x), *size, generator=generator)
    return grad.to(x)


def fused_of(report):
    return sum(item.norms for item in report.fused)


@pytest.mark.parametrize('name', BLOCKS)
def test_unfused(name):
    block = make_block(name)
    report = convert_model(block, dict(fuse=False))
    assert not report.fused and 'fused' not in str(report)
    assert not any(map(is_fused, block.modules()))


@pytest.mark.parametrize('name', BLOCKS)
def test_exact_levels(name, device):
    block = make_block(name).to(device)
    x = make_input(device)
    expected = run(copy.deepcopy(block), x)
    evaluated = copy.deepcopy(block).eval()(x)
    with torch.no_grad():
        without_grad = copy.deepcopy(block)(x)
    for level in ('L3', 'L0'):
        report = convert_model(block, level)
        if level == 'L3':
            assert fused_of(report) == BLOCKS[name][1]
        assert_same_bits(copy.deepcopy(block).eval()(x), evaluated)
        if name not in RANDOM:
            with torch.no_grad():
                assert_same_bits(copy.deepcopy(block)(x), without_grad)
    for key, value in run(block, x).items():
        assert_same_bits(value, expected[key])


@pytest.mark.parametrize('name', [n for n in BLOCKS if n not in RANDOM])
@in_turn(channels_last=[False, True])
def test_gradients_at_8_bits(name, channels_last, device):
    block = make_block(name).to(device)
    x = make_input(device, channels_last)
    if channels_last:
        block = block.to(memory_format=torch.channels_last)
    exact = copy.deepcopy(block).double()
    expected = gradients(exact, x.double(), _grad(block, x).double())
    convert_model(block, FINE)
    found = run(block, x)
    assert relative_error(found['output'], expected['output']) < 1e-4
    total = sum(
        float((found[k].double() - v).square().sum())
        for k, v in expected.items()
        if k != 'output'
    )
    size = sum(
        float(v.square().sum()) for k, v in expected.items() if k != 'output'
    )
    # In HRNet's last stage a normalisation has four values a channel, which
    # amplifies their noise.
    assert (total / size) ** 0.5 < (0.2 if 'HRNet' in name else 0.03)
    # The statistics equal torch's.
    for key, value in exact.state_dict().items():
        if 'running' in key:
            ours = block.state_dict()[key]
            assert relative_error(ours, value) < FLOAT32_ERROR


@in_turn(dtype=[torch.float16, torch.bfloat16])
def test_autocast(dtype, device):
    block = make_block('mmdet bottleneck, stride').to(device)
    x = make_input(device)
    expected = gradients(copy.deepcopy(block).double(), x.double(), None)
    with torch.autocast(device.type, dtype):
        exact = gradients(copy.deepcopy(block), x, None)
        convert_model(block, FINE)
        found = gradients(block, x, None)
    assert found['output'].dtype == dtype
    for key, value in expected.items():
        limit = 2.5 * relative_error(exact[key], value) + 0.04
        assert relative_error(found[key], value) < limit, key


@pytest.mark.parametrize('rounding', ['dither', 'rotated'])
@pytest.mark.parametrize(
    'name', ['mmdet bottleneck, stride', 'ConvModule', 'mmdet stem']
)
def test_unbiased(name, rounding, device):
    block = make_block(name).to(device)
    x = make_input(device)
    expected = run(copy.deepcopy(block), x)
    convert_model(block, dict(FIXED, rounding=rounding))
    keys = [k for k, v in expected.items() if k != 'output']
    draws = 64

    def error(found):
        parts = [
            float((found[k].double() - expected[k].double()).square().sum())
            for k in keys
        ]
        return sum(parts)

    found = [run(block, x) for _ in range(draws)]
    single = sum(map(error, found)) / draws
    mean = {k: sum(f[k].double() for f in found) / draws for k in keys}
    # The error falls as 1 / draws, but for the normalisation's bias of second
    # order.
    assert error(mean) < 3 * single / draws
    assert single > 0


@pytest.mark.parametrize(
    ('level', 'rectified', 'normalised'), [(FIXED, 3, 2), ('L3S', 2, 1)]
)
def test_kept_codes(level, rectified, normalised):
    block = make_block('mmdet bottleneck')
    convert_model(block, level)
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    with saved_tensors() as saved:
        block(x)
    # Not the bits of samples.
    codes = {
        t.data_ptr(): t
        for t in saved
        if t.dtype == torch.uint8 and t.numel() > len(x)
    }
    bits = sorted(8 * t.nbytes / x.numel() for t in codes.values())
    # 4 channels: the outputs of two ReLUs, which the next convolutions read.
    # 16 channels: the last normalisation, the input and the sum.
    assert bits == [rectified / 4, rectified / 4, normalised, 2, 2]
    large = [t for t in saved if t.is_floating_point() and t.dim() == 4]
    assert {t.shape for t in large} <= {p.shape for p in block.parameters()}


def test_meter():
    block = make_block('mmdet bottleneck')
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    with measure_activations(block) as exact:
        block(x)
    convert_model(block, FIXED)
    with measure_activations(block) as meter:
        block(x)
    # Torch's in-place ReLU keeps no tensor that a layer does not keep.
    assert meter.exact_bytes == pytest.approx(exact.saved_bytes, rel=0.02)
    assert meter.ratio > 10


def test_one_tensor_is_packed_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(16, 16, 1)
            self.left = nn.Conv2d(16, 8, 3)
            self.right = nn.Conv2d(16, 8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.left(x) + self.right(x)

    net = Two()
    convert_model(net, 'L2')
    with saved_tensors() as saved:
        net(make_input())
    codes = {t.data_ptr() for t in saved if t.dtype == torch.uint8}
    assert len(codes) == 2
    # A layer with more bits has a payload of its own.
    convert_model(net, dict(base='L2', rules=dict(right=8)))
    with saved_tensors() as saved:
        net(make_input())
    assert len({t.data_ptr() for t in saved if t.dtype == torch.uint8}) == 3


def test_a_leaf_is_packed_in_every_pass():
    net = nn.Sequential(nn.Conv2d(16, 8, 3))
    convert_model(net, dict(base='L2', conv=2))
    x = make_input()
    found = [gradients(net, x, None)['0.weight'] for _ in range(2)]
    assert not torch.equal(*found)


def test_tensor_modified_between_layers():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_block('ConvModule')
            self.conv = nn.Conv2d(16, 16, 1, bias=False)
            self.inplace = False

        def forward(self, x):
            out = self.body(x)
            out = out.mul_(2.0) if self.inplace else out * 2.0
            return self.conv(out)

    torch.manual_seed(0)
    net = Doubled()
    x = make_input()
    expected = gradients(copy.deepcopy(net), x, None)
    convert_model(net, FINE)
    net.inplace = True
    found = gradients(net, x, None)
    for key in ('conv.weight', 'body.conv.weight'):
        assert relative_error(found[key], expected[key]) < 0.03


@pytest.mark.parametrize('frozen', ['all', 'weight', 'norm_eval'])
def test_norm_eval(frozen, device):
    block = make_block('mmdet bottleneck, stride').to(device)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.requires_grad_(frozen not in ('all', 'weight'))
            module.bias.requires_grad_(frozen != 'all')
    x = make_input(device)
    expected = run(copy.deepcopy(block), x)
    convert_model(block, FINE)
    found = run(block, x)
    for key, value in expected.items():
        if value is None:
            assert found[key] is None
        elif key in ('input', 'output', 'bn3.bias'):
            # The gradient of the input depends on masks alone, not on codes.
            assert relative_error(found[key], value) < FLOAT32_ERROR
        else:
            assert relative_error(found[key], value) < 0.03


def test_hooks_see_outputs_of_layers():
    block = make_block('mmdet bottleneck')
    x = make_input()
    seen = {}
    names = ('bn1', 'bn3')

    def watch(model, into):
        for name in names:
            getattr(model, name).register_forward_hook(
                lambda m, args, out, name=name: into.__setitem__(
                    name, out.detach().clone()
                )
            )

    exact = copy.deepcopy(block)
    watch(exact, seen)
    exact(x)
    expected, seen = dict(seen), {}
    convert_model(block, FIXED)
    watch(block, seen)
    block(x).sum().backward()
    assert any(float(v.min()) < 0 for v in seen.values())
    for name in names:
        assert relative_error(seen[name], expected[name]) < 1e-5


@pytest.mark.parametrize('max_bytes', [chain._MAX_BYTES, 0])
def test_shortcut_shares_the_payload_of_a_leaf(max_bytes):
    block = make_block('mmdet bottleneck, stride')
    convert_model(block, FIXED)
    x = make_input()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, '_MAX_BYTES', max_bytes)
        found = []
        for _ in range(2):
            with saved_tensors() as saved:
                block(x)
            codes = {
                t.data_ptr(): t
                for t in saved
                if t.dtype == torch.uint8 and t.shape[0] == len(x)
            }
            size = math.ceil(x[0].numel() / 8) * 2
            own = [t for t in codes.values() if t.shape[1:] == (size,)]
            # Two convolutions share one payload.
            assert len(own) == 1
            found += own
    # Each pass has a payload of its own.
    assert not torch.equal(*found)
    assert not any(name.startswith('_mmactnn') for name in vars(x))


@pytest.mark.parametrize('name', ['mmdet bottleneck', 'ConvModule'])
def test_overwrites_outputs_of_convolutions(name):
    block = make_block(name)
    convert_model(block, FIXED)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    x = make_input()
    plain = copy.deepcopy(block)(x)
    seen = []
    for conv in convs:
        conv.register_forward_hook(lambda m, args, out: seen.append(out))
    hooked = block(x)
    # The results are equal, and the tensors that hooks got are unchanged.
    assert_same_bits(hooked, plain)
    assert len(seen) == len(convs)
    assert all(out._version == 0 and float(out.min()) < 0 for out in seen)
    for conv in convs:
        conv._forward_hooks.clear()
    written = []
    original = torch.convolution

    def watched(*args):
        written.append(original(*args))
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'convolution', watched)
        # A chain would call it outside of Python.
        patch.setattr(chain, '_MAX_BYTES', 0)
        block(x)
    assert len(written) == len(convs)
    # The normalised and rectified values have overwritten them.
    assert all(float(out.min()) == 0 for out in written)


def test_copies_and_pickles_are_independent():
    block = make_block('mmdet bottleneck')
    convert_model(block, FIXED)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is type(block) and is_fused(twin)
        names = nodes(twin(make_input()))
        assert names.count('_ChainBackward') == 1
        twin.conv1.weight.data.zero_()
        block(make_input()).sum().backward()
        assert twin.conv1.weight.grad is None


def test_revert():
    block = make_block('mmdet stem')
    before = {n: type(m) for n, m in block.named_modules()}
    convert_model(block, FIXED)
    revert_model(block)
    assert {n: type(m) for n, m in block.named_modules()} == before
    assert not any('forward' in vars(m) for m in block.modules())


def test_convolution_without_activation():
    module = make_block('ConvModule')
    x = make_input()
    expected = copy.deepcopy(module)(x, activate=False)
    convert_model(module, FIXED)
    assert relative_error(module(x, activate=False), expected) < 1e-5
    assert float(expected.min()) < 0


def test_rules_and_filters():
    block = make_block('mmdet bottleneck')
    report = convert_model(block, dict(rules=dict(bn2=None)))
    assert fused_of(report) == 2
    report = convert_model(block, dict(rules=dict(bn1=6)))
    assert block.bn1.quantizer.fused_bits == (6, 7, 6)
    assert fused_of(report) == 3
    # Layers that the filters exclude take part unchanged.
    report = convert_model(block, 'L2', include=['bn3'])
    assert fused_of(report) == 3
    assert block.bn1.quantizer.fused_bits == (6, 7, 6)
    assert block.bn3.quantizer.fused_bits == (4, 4, 4)


def test_without_relu_at_the_level():
    block = make_block('mmdet bottleneck')
    assert not convert_model(block, 'L1').fused
    assert not convert_model(block, dict(mask=False)).fused


def test_subclass_with_its_own_forward():
    block = make_block('Sequential')

    class Own(nn.Sequential):
        def forward(self, x):
            return self[4](self[3](self[1](self[0](x))))

    own = Own(*block)
    assert not convert_model(own, 'L3').fused


def test_a_norm_by_itself_does_not_rectify():
    block = make_block('mmdet bottleneck')
    convert_model(block, FIXED)
    assert isinstance(block.bn1, QBatchNorm2d)
    x = torch.randn(4, 4, 8, 8, requires_grad=True)
    assert float(block.bn1(x).min()) < 0


@pytest.mark.parametrize('bad', [1, 9, 2.5, None])
def test_rectified_bits(bad):
    with pytest.raises((TypeError, ValueError), match='rectified'):
        convert_model(nn.ReLU(), dict(rectified=bad))
    if bad is not None:
        with pytest.raises(ValueError, match='head'):
            convert_model(nn.ReLU(), dict(head=bad))


@pytest.mark.parametrize(
    ('level', 'bits'),
    [
        ('L3', 4),
        ('L2', 4),
        (dict(head=None), 3),
        (dict(head=6), 6),
        (dict(rectified=5), 5),
        (dict(rules={'bn': 2}), 3),
    ],
)
def test_bits_of_heads(level, bits):
    block = make_block('ConvModule')
    convert_model(block, level)
    assert block.bn.quantizer.fused_bits.split == bits
    residual = make_block('mmdet bottleneck')
    convert_model(residual, 'L3')
    assert residual.bn1.quantizer.fused_bits.split == 3


def test_one_value_a_channel():
    block = make_block('ConvModule')
    convert_model(block, FIXED)
    with pytest.raises(ValueError, match='more than 1 value'):
        block(torch.randn(1, 16, 1, 1))


def test_no_samples():
    block = make_block('ConvModule')
    convert_model(block, FIXED)
    block(torch.zeros(0, 16, 8, 8)).sum().backward()
    assert not block.conv.weight.grad.any()
