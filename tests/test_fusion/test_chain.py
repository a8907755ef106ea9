"""Chains of the layers of a block, against the layers one by one."""

import collections
import copy
import pickle

import pytest
import torch
from support.blocks import BLOCKS, make_block
from support.chains import assert_equal, nodes
from support.layers import (
    assert_same_bits,
    exact_numerics,
    gradients,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn

from mmactnn import convert_model, get_precision, measure_activations
from mmactnn.fusion import chain

# The other blocks have nodes of operations that are no layers.
CHAINED = [
    name
    for name in BLOCKS
    if 'bottleneck' in name
    or ('basic' in name and 'torchvision ResNet' not in name)
    or 'ConvModule' in name
]


def make_input(device='cpu', channels_last=False):
    x = torch.randn(4, 16, 9, 7, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def run_both(block, x):
    """Results as a chain and layer by layer, with the same random bits."""
    found = []
    for max_bytes in (chain._MAX_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch, exact_numerics():
            patch.setattr(chain, '_MAX_BYTES', max_bytes)
            found.append(gradients(copy.deepcopy(block), x, None))
    return found


@pytest.mark.parametrize('name', CHAINED)
@in_turn(channels_last=[False, True])
def test_equal_to_layers(name, channels_last, device):
    block = make_block(name).to(device)
    x = make_input(device, channels_last)
    if channels_last:
        block = block.to(memory_format=torch.channels_last)
    convert_model(block, 'L3')
    chained, layered = run_both(block, x)
    assert_equal(chained, layered)


@in_turn(dtype=[torch.float16, torch.bfloat16])
def test_equal_under_autocast(dtype, device):
    block = make_block('mmdet bottleneck, stride').to(device)
    convert_model(block, 'L3')
    with torch.autocast(device.type, dtype):
        chained, layered = run_both(block, make_input(device))
    assert chained['output'].dtype == dtype
    assert_equal(chained, layered)


@in_turn(
    needs_input=[True, False],
    frozen=[
        ('conv1', 'bn1'),
        ('conv2',),
        ('bn2',),
        ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3'),
    ],
)
def test_frozen_parts(frozen, needs_input):
    block = make_block('mmdet bottleneck')
    for name in frozen:
        getattr(block, name).requires_grad_(False)
    convert_model(block, 'L3')
    found = []
    for max_bytes in (chain._MAX_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain, '_MAX_BYTES', max_bytes)
            twin = copy.deepcopy(block)
            torch.manual_seed(0)
            x = make_input().requires_grad_(needs_input)
            y = twin(x)
            if y.requires_grad:
                y.sum().backward()
            grads = {n: p.grad for n, p in twin.named_parameters()}
            found.append(dict(output=y.detach(), input=x.grad, **grads))
    assert_equal(*found)


def test_one_node():
    block = make_block('mmdet bottleneck')
    convert_model(block, 'L3')
    x = make_input().requires_grad_()
    names = nodes(block(x))
    assert sorted(set(names)) == [
        '_ChainBackward',
        'torch::autograd::AccumulateGrad',
    ]
    assert names.count('_ChainBackward') == 1
    strided = make_block('mmdet bottleneck, stride')
    convert_model(strided, dict(base='L3', adaptive=False))
    # The chain includes the shortcut.
    assert nodes(strided(x)).count('_ChainBackward') == 1


@pytest.mark.parametrize(
    ('watch', 'left'),
    [
        (lambda block: block.conv2.register_forward_hook(lambda *_: None), 0),
        (
            lambda block: block.bn2.register_forward_pre_hook(lambda *_: None),
            0,
        ),
        (lambda block: block.relu.register_forward_hook(lambda *_: None), 0),
        # The layers behind it still run as a chain.
        (
            lambda block: block.conv1.register_full_backward_hook(
                lambda *_: None
            ),
            1,
        ),
        (
            lambda block: setattr(block.conv1, 'forward', block.conv1.forward),
            1,
        ),
        (lambda block: nn.Module.eval(block.conv1), 1),
        (lambda block: nn.utils.parametrizations.weight_norm(block.conv1), 1),
    ],
)
def test_hooks_and_patches(watch, left):
    block = make_block('mmdet bottleneck')
    convert_model(block, 'L3')
    x = make_input().requires_grad_()
    expected = block(x)
    twin = copy.deepcopy(block)
    watch(twin)
    y = twin(x)
    assert nodes(y).count('_ChainBackward') == left
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'layer', 'other', 'left'),
    [
        ('mmdet bottleneck', 'conv1', nn.Conv2d(16, 4, 1, bias=False), 1),
        ('mmdet bottleneck', 'conv3', nn.Conv2d(4, 16, 1, bias=False), 0),
        ('ConvModule without norm', 'conv', nn.Conv2d(16, 16, 3, 1, 1), 0),
        ('mmdet bottleneck', 'bn1', nn.BatchNorm2d(4), 1),
        ('mmdet bottleneck', 'bn3', nn.BatchNorm2d(16), 0),
        ('mmdet bottleneck', 'relu', nn.LeakyReLU(0.5), 0),
        ('ConvModule', 'bn', nn.BatchNorm2d(16), 0),
        ('ConvModule', 'activate', nn.LeakyReLU(0.5), 0),
        ('ConvModule without norm', 'activate', nn.LeakyReLU(0.5), 0),
    ],
)
def test_replaced_layers(name, layer, other, left):
    block = make_block(name)
    exact = copy.deepcopy(block)
    setattr(exact, layer, copy.deepcopy(other))
    convert_model(block, 'L3')
    setattr(block, layer, copy.deepcopy(other))
    x = make_input().requires_grad_()
    y = block(x)
    assert torch.allclose(y, exact(x), atol=1e-5)
    # The other layers may still run as a chain.
    assert nodes(y).count('_ChainBackward') == left
    y.sum().backward()


def test_padding_by_name():
    block = make_block('ConvModule without norm')
    block.conv.padding = 'same'
    convert_model(block, 'L3')
    assert '_ChainBackward' not in nodes(block(make_input()))


def test_one_value_a_channel():
    block = make_block('ConvModule')
    convert_model(block, 'L3')
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        block(torch.randn(1, 16, 1, 1))


def test_broadcast_shortcut():
    block = make_block('mmdet bottleneck')
    block.downsample = nn.AdaptiveAvgPool2d(1)
    exact = copy.deepcopy(block)
    convert_model(block, dict(base='L2', conv=8, norm=8, rectified=8))
    x = make_input()
    assert torch.allclose(block(x), exact(x), atol=1e-5)


def test_retained_graph():
    block = make_block('mmdet bottleneck')
    convert_model(block, 'L3')
    x = make_input().requires_grad_()
    y = block(x).sum()
    wanted = [x, *block.parameters()]
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    for again, grad in zip(torch.autograd.grad(y, wanted), first):
        assert_same_bits(again, grad)


@pytest.mark.parametrize('name', ['conv1.weight', 'bn2.bias', 'conv3.weight'])
def test_gradients_of_some_tensors(name):
    block = make_block('mmdet bottleneck')
    convert_model(block, 'L3')
    x = make_input().requires_grad_()
    y = block(x).sum()
    wanted = x, block.get_parameter(name)
    both = torch.autograd.grad(y, wanted, retain_graph=True)
    for tensor, expected in zip(wanted, both):
        (found,) = torch.autograd.grad(y, tensor, retain_graph=True)
        assert_same_bits(found, expected)


def test_second_derivatives_are_refused():
    block = make_block('ConvModule without norm')
    convert_model(block, 'L3')
    x = make_input().requires_grad_()
    y = block(x).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated twice'):
        grad.sum().backward()


def test_kept_and_counted_bytes():
    block = make_block('mmdet bottleneck')
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    convert_model(block, dict(base='L2', conv=2, norm=2, rectified=3))
    found = []
    for max_bytes in (chain._MAX_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain, '_MAX_BYTES', max_bytes)
            twin = copy.deepcopy(block)
            with measure_activations(twin) as meter:
                twin(x)
            with saved_tensors() as saved:
                twin(x)
            kept = {t.data_ptr(): t.nbytes for t in saved}
            # Parameters take no additional memory.
            for parameter in twin.parameters():
                kept.pop(parameter.data_ptr(), None)
            found.append(
                (meter.exact_bytes, meter.saved_bytes, sum(kept.values()))
            )
    assert found[0] == found[1]


def test_relu_keeps_no_mask_behind_a_convolution():
    block = make_block('ConvModule without norm')
    follower = nn.Sequential(block, nn.Conv2d(16, 4, 1))
    convert_model(follower, dict(base='L2', conv=2, norm=2, rectified=3))
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    numel = 4 * 16 * 16 * 16
    for max_bytes in (chain._MAX_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain, '_MAX_BYTES', max_bytes)
            with saved_tensors() as saved:
                follower(x)
        kept = {t.data_ptr(): t for t in saved}
        codes = [t.nbytes for t in kept.values() if t.dtype == torch.uint8]
        # Codes of the input, and of the output, which the follower reads.
        assert sorted(codes) == [numel * 2 // 8, numel * 3 // 8]


def change_bits(block):
    convert_model(block, 'L2')


def put_in_place(block):
    quantizer = block.conv2.quantizer
    block.conv2 = copy.deepcopy(block.conv2)
    # The quantizer of a copy has other random bits and another cache.
    block.conv2.quantizer = quantizer
    block.conv2.weight.data.mul_(2)


@pytest.mark.parametrize(
    'change',
    [
        lambda block: setattr(block.bn1, 'momentum', 0.5),
        lambda block: setattr(block.bn2, 'eps', 0.5),
        lambda block: setattr(block.bn2, 'momentum', None),
        lambda block: block.bn1.eval(),
        lambda block: block.conv2.requires_grad_(False),
        lambda block: setattr(block.conv2, 'dilation', (2, 2)),
        lambda block: setattr(block.conv2, 'stride', (2, 2)),
        lambda block: setattr(block.conv2, 'padding', 'same'),
        lambda block: setattr(block.conv2, 'padding_mode', 'circular'),
        lambda block: setattr(block.conv3.quantizer, 'bits', 8),
        lambda block: setattr(block.conv1.quantizer, 'rounding', 'stochastic'),
        lambda block: setattr(block.bn2.quantizer, 'rounding', 'stochastic'),
        lambda block: setattr(block.bn1, 'weight', None),
        lambda block: setattr(block.bn1, 'track_running_stats', False),
        lambda block: block.bn1.register_buffer('running_mean', None),
        lambda block: block.conv1.register_forward_hook(lambda *_: None),
        lambda block: setattr(
            block.conv1, '_forward_hooks', collections.OrderedDict()
        ),
        lambda block: block.half(),
        lambda block: block.eval(),
        lambda block: block.to(memory_format=torch.channels_last),
        lambda block: setattr(block, 'relu', nn.LeakyReLU(0.5)),
        put_in_place,
        change_bits,
    ],
)
def test_changes_between_calls(change):
    """A block that has run equals one that has not run before a change."""
    block = make_block('mmdet bottleneck')
    convert_model(block, dict(base='L2', conv=2, norm=2, rectified=3))
    found, x = [], make_input()
    for runs in (2, 0):
        twin = copy.deepcopy(block)
        for _ in range(runs):
            gradients(twin, x[..., :3, :3], None)
        # The running statistics include the batches of these runs.
        twin.load_state_dict(block.state_dict())
        change(twin)
        layer = next(m for m in twin.modules() if hasattr(m, 'quantizer'))
        layer.quantizer.generator.manual_seed(3)
        try:
            own = x.to(twin.conv1.weight.dtype)
            found.append(
                {**gradients(twin, own, None), **dict(twin.named_buffers())}
            )
        except RuntimeError as error:
            found.append(dict(error=str(error)))
    if 'error' in found[1]:
        assert found[0] == found[1]
    else:
        assert_equal(*found)


def test_hooks_that_come_and_go():
    block = make_block('mmdet bottleneck')
    convert_model(block, 'L3')
    x = make_input().requires_grad_()
    seen = []
    for _ in range(2):
        assert '_ChainBackward' in nodes(block(x))
        handle = block.bn2.register_forward_hook(lambda *_: seen.append(1))
        assert '_ChainBackward' not in nodes(block(x))
        handle.remove()
    assert len(seen) == 2
    # A new dict of hooks takes the place of the old one.
    block.bn2._forward_hooks = collections.OrderedDict()
    assert '_ChainBackward' in nodes(block(x))
    block.bn2.register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert len(seen) == 3


def test_noncontiguous_inputs(device):
    block = make_block('mmdet bottleneck').to(device)
    convert_model(block, 'L3')
    x = make_input(device)[..., ::2]
    with exact_numerics():
        x = x.requires_grad_()
        found = []
        for max_bytes in (chain._MAX_BYTES, 0):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chain, '_MAX_BYTES', max_bytes)
                twin = copy.deepcopy(block)
                y = twin(x)
                assert ('_ChainBackward' in nodes(y)) == (max_bytes > 0)
                wanted = [x, *twin.parameters()]
                grads = torch.autograd.grad(y.sum(), wanted)
                found.append(dict(enumerate([y.detach(), *grads])))
    assert_equal(*found)


def test_varying_shapes():
    block = make_block('mmdet bottleneck')
    convert_model(block, 'L3')
    for size in (9, 5, 9, 7):
        x = torch.randn(2, 16, size, size)
        chained, layered = run_both(block, x)
        assert_equal(chained, layered)


def test_copies_and_pickles_run():
    block = make_block('mmdet bottleneck')
    convert_model(block, 'L3')
    x = make_input()
    block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        twin.conv1.weight.data.zero_()
        y = twin(x.requires_grad_())
        assert '_ChainBackward' in nodes(y)
        assert not torch.equal(y, block(x))


def test_adaptive_reports():
    """Layers that read rectified tensors make no reports."""
    block = make_block('mmdet bottleneck, stride')
    convert_model(block, 'L3')
    precision = get_precision(block)
    x = make_input().requires_grad_()
    block(x).sum().backward()
    names = {
        layer.name for layer in precision.layers if layer.report is not None
    }
    # The other layers read rectified tensors, or share the payload.
    assert names == {'downsample.0'}
