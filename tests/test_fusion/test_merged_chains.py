"""Chains of stages, necks and heads, against their layers one by one."""

import copy

import pytest
import torch
from support.chains import assert_equal, nodes
from support.layers import exact_numerics, saved_tensors
from support.pairs import in_turn
from torch import nn

from mmactnn import convert_model, revert_model
from mmactnn.fusion import chain


def make_stage(depth=3):
    from mmdet.models.backbones.resnet import Bottleneck
    from mmdet.models.layers import ResLayer

    torch.manual_seed(2)
    return ResLayer(Bottleneck, 16, 8, depth, stride=2).train()


ANCHORS = dict(
    type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[8, 16]
)


def make_retina_head(**kwargs):
    from mmdet.models.dense_heads import RetinaHead

    torch.manual_seed(3)
    head = RetinaHead(
        2,
        8,
        stacked_convs=2,
        feat_channels=8,
        anchor_generator=ANCHORS,
        **kwargs,
    )
    return head.train()


def make_rpn_head(**kwargs):
    from mmdet.models.dense_heads import RPNHead

    torch.manual_seed(3)
    head = RPNHead(
        8,
        feat_channels=8,
        anchor_generator=ANCHORS,
        **kwargs,
    )
    return head.train()


PYRAMID = [(2, 4, 13, 9), (2, 8, 7, 5), (2, 6, 4, 3)]


def make_mask_head(**kwargs):
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    torch.manual_seed(6)
    kwargs = dict(in_channels=8, conv_out_channels=8, num_classes=3, **kwargs)
    return FCNMaskHead(num_convs=3, **kwargs).train()


def make_neck(package='mmdet', **kwargs):
    necks = __import__(f'{package}.models.necks', fromlist=['FPN'])
    torch.manual_seed(5)
    return necks.FPN([4, 8, 6], 8, **{'num_outs': 3, **kwargs}).train()


# Parts, shapes of their inputs, and numbers of their chains. Unmerged, each
# block or tower would be a chain.
PARTS = {
    'stage': (make_stage, [(4, 16, 9, 7)], 1),
    'stage of one block': (lambda: make_stage(1), [(4, 16, 9, 7)], 1),
    'RetinaHead': (make_retina_head, [(2, 8, n, n) for n in (9, 5, 3)], 1),
    'RetinaHead with norm': (
        lambda: make_retina_head(norm_cfg=dict(type='BN')),
        [(2, 8, n, n) for n in (9, 5)],
        1,
    ),
    'RPNHead': (make_rpn_head, [(2, 8, n, n) for n in (9, 5, 3)], 1),
    'FCNMaskHead': (make_mask_head, [(5, 8, 6, 6)], 1),
    'FCNMaskHead with norm': (
        lambda: make_mask_head(
            norm_cfg=dict(type='BN'),
            upsample_cfg=dict(type='nearest', scale_factor=2),
        ),
        [(5, 8, 6, 6)],
        1,
    ),
    'mmdet FPN': (make_neck, PYRAMID, 2),
    'mmseg FPN': (lambda: make_neck('mmseg'), PYRAMID, 2),
    'FPN, pooling': (lambda: make_neck(num_outs=4), PYRAMID, 2),
    'FPN, on input': (
        lambda: make_neck(num_outs=5, add_extra_convs='on_input'),
        PYRAMID,
        2,
    ),
    'FPN, ReLU': (
        lambda: make_neck(
            num_outs=5,
            add_extra_convs='on_output',
            relu_before_extra_convs=True,
        ),
        PYRAMID,
        2,
    ),
    'FPN, last levels': (
        lambda: make_neck(start_level=1, num_outs=2),
        PYRAMID,
        2,
    ),
}
FIXED = dict(base='L2', conv=2, norm=2, rectified=3)


def flatten(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [x for part in outputs for x in flatten(part)]


def count_chains(outputs):
    return nodes(sum(x.sum() for x in outputs)).count('_ChainBackward')


def call(part, inputs):
    return flatten(part(inputs if len(inputs) > 1 else inputs[0]))


def run(part, inputs):
    """Results of a forward and a backward pass, and the number of chains."""
    part.zero_grad()
    leaves = [x.detach().requires_grad_() for x in inputs]
    with exact_numerics():
        outputs = call(part, [x * 1 for x in leaves])
        chains = count_chains(outputs)
        sum(x.square().sum() for x in outputs).backward()
    found = dict(enumerate(x.detach() for x in outputs))
    found.update((f'input {i}', x.grad) for i, x in enumerate(leaves))
    found.update((n, p.grad) for n, p in part.named_parameters())
    found.update(part.named_buffers())
    return found, chains


def make_part(name, level, device):
    make, shapes, chains = PARTS[name]
    part = make().to(device)
    convert_model(part, level)
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    return part, inputs, chains


def run_both(part, inputs, passes=1):
    """Results of the last pass, as chains and layer by layer."""
    found = []
    for max_bytes in (chain._MAX_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain, '_MAX_BYTES', max_bytes)
            twin = copy.deepcopy(part)
            for _ in range(passes):
                result = run(twin, inputs)
            found.append(result)
    return found


@pytest.mark.parametrize('name', PARTS)
def test_equal_to_layers(name, device):
    part, inputs, wanted = make_part(name, FIXED, device)
    (found, chains), (expected, others) = run_both(part, inputs)
    assert (chains, others) == (wanted, 0)
    assert_equal(found, expected)


@pytest.mark.parametrize('name', ['stage', 'RPNHead', 'mmdet FPN'])
def test_equal_with_adaptive_bits(name, device):
    part, inputs, wanted = make_part(name, 'L3', device)
    # In the first two passes each layer runs by itself to make its report.
    assert run(copy.deepcopy(part), inputs)[1] != wanted
    (found, chains), (expected, others) = run_both(part, inputs, 3)
    assert (chains, others) == (wanted, 0)
    assert_equal(found, expected)


@pytest.mark.parametrize('name', ['stage', 'RetinaHead', 'RPNHead'])
@in_turn(dtype=[torch.float16, torch.bfloat16])
def test_equal_under_autocast(name, dtype, device):
    part, inputs, wanted = make_part(name, FIXED, device)
    inputs = [x.to(dtype) for x in inputs]
    with torch.autocast(device.type, dtype):
        (found, chains), (expected, others) = run_both(part, inputs)
    assert (chains, others) == (wanted, 0)
    assert found[0].dtype == dtype
    assert_equal(found, expected)


@pytest.mark.parametrize('name', ['stage', 'RetinaHead', 'RPNHead'])
def test_autocast_of_float32_inputs(name, device):
    """Several layers share one cast and one payload of an input."""
    part, inputs, _ = make_part(
        name, dict(base='L2', conv=8, norm=8, rectified=8), device
    )
    with torch.autocast(device.type, torch.bfloat16):
        (found, _), (expected, _) = run_both(part, inputs)
    for key, tensor in expected.items():
        if tensor is not None and tensor.is_floating_point():
            assert found[key].dtype == tensor.dtype
            difference = (found[key].double() - tensor.double()).norm()
            # The constant is for gradients that are rounding errors alone:
            # of biases that a normalisation cancels.
            assert difference < 0.06 * tensor.double().norm() + 0.1, key


@pytest.mark.parametrize('name', PARTS)
def test_exact_at_level_0(name):
    make, shapes, _ = PARTS[name]
    part, inputs = make(), [torch.randn(shape) for shape in shapes]
    expected, _ = run(copy.deepcopy(part), inputs)
    convert_model(part, 'L0')
    found, chains = run(part, inputs)
    assert chains == 0
    assert_equal(found, expected)


@pytest.mark.parametrize('name', PARTS)
def test_unfused(name):
    part, inputs, _ = make_part(name, dict(base='L3', fuse=False), 'cpu')
    assert run(part, inputs)[1] == 0


@pytest.mark.parametrize('name', PARTS)
def test_state_and_output_are_those_of_the_stock_part(name):
    make, shapes, _ = PARTS[name]
    part, inputs = make(), [torch.randn(shape) for shape in shapes]
    twin = copy.deepcopy(part)
    convert_model(twin, FIXED)
    assert list(twin.state_dict()) == list(part.state_dict())
    for found, expected in zip(call(twin, inputs), call(part, inputs)):
        assert torch.allclose(found, expected, atol=1e-5)
    # The call has left chains in places, which go again.
    revert_model(twin)
    for found, expected in zip(twin.modules(), part.modules()):
        assert type(found) is type(expected)
        assert vars(found).keys() == vars(expected).keys()


def add_hook(module):
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ('name', 'watch', 'left'),
    [
        ('stage', lambda part: add_hook(part[1]), 3),
        ('stage', lambda part: add_hook(part[1].conv2), 2),
        ('stage', lambda part: add_hook(part[0].downsample), 3),
        ('stage', lambda part: part[2].eval(), 2),
        ('stage', lambda part: part[2].conv1.requires_grad_(False), 3),
        ('RetinaHead', lambda part: add_hook(part.cls_convs[1]), 9),
        ('RetinaHead', lambda part: add_hook(part.retina_cls), 9),
        ('RPNHead', lambda part: add_hook(part.rpn_conv), 0),
        ('RPNHead', lambda part: add_hook(part.relu), 0),
        ('FCNMaskHead', lambda part: add_hook(part.convs[1].conv), 2),
        ('FCNMaskHead', lambda part: add_hook(part.convs[1]), 3),
        ('mmdet FPN', lambda part: add_hook(part.lateral_convs[0]), 1),
        ('mmdet FPN', lambda part: add_hook(part.fpn_convs[0].conv), 1),
    ],
)
def test_hooks_and_frozen_parts(name, watch, left):
    part, inputs, wanted = make_part(name, FIXED, torch.device('cpu'))
    expected = call(part, inputs)
    assert count_chains(call(part, [x.requires_grad_() for x in inputs])) == (
        wanted
    )
    twin = copy.deepcopy(part)
    watch(twin)
    outputs = call(twin, inputs)
    assert count_chains(outputs) == left
    if name != 'stage':
        for found, wanted in zip(outputs, expected):
            assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'large', 'wanted'),
    [
        # Two towers of the largest level, and one chain of all others.
        ('RetinaHead', 1, 3),
        # The largest level has none; two towers of the next, and the last.
        ('RetinaHead', 2, 3),
        ('RPNHead', 1, 1),
        ('mmdet FPN', 1, 2),
    ],
)
def test_large_levels_are_left_out(name, large, wanted, monkeypatch):
    part, inputs, _ = make_part(name, FIXED, torch.device('cpu'))
    twin = copy.deepcopy(part)
    monkeypatch.setattr(chain, '_MAX_BYTES', 0)
    expected, _ = run(twin, inputs)
    limit = sum(x.nbytes for x in inputs[large - 1 :]) - 1
    monkeypatch.setattr(chain, '_MAX_BYTES', limit)
    found, chains = run(part, inputs)
    assert chains == wanted
    assert_equal(found, expected)


def test_large_outputs(monkeypatch):
    part = make_retina_head()
    convert_model(part, FIXED)
    inputs = [torch.randn(2, 8, n, n) for n in (9, 5, 3)]
    # The outputs have 2 + 4 channels, the inputs 8.
    monkeypatch.setattr(chain, '_MAX_BYTES', sum(x.nbytes for x in inputs))
    assert run(part, inputs)[1] == 1
    wide = nn.Conv2d(8, 32, 3, padding=1)
    convert_model(wide, FIXED)
    wide.quantizer.generator = part.retina_reg.quantizer.generator
    wide.quantizer.cache = part.retina_reg.quantizer.cache
    part.retina_cls = wide
    twin = copy.deepcopy(part)
    # Two towers of two levels, and the last level.
    found, chains = run(part, inputs)
    assert chains == 5
    monkeypatch.setattr(chain, '_MAX_BYTES', 0)
    assert_equal(found, run(twin, inputs)[0])


def test_large_first_block_of_a_stage(monkeypatch):
    part, inputs, _ = make_part('stage', FIXED, torch.device('cpu'))
    twin = copy.deepcopy(part)
    monkeypatch.setattr(chain, '_MAX_BYTES', 0)
    expected, _ = run(twin, inputs)
    # The output of the block, and the tensors within it, are smaller.
    monkeypatch.setattr(chain, '_MAX_BYTES', inputs[0].nbytes - 1)
    found, chains = run(part, inputs)
    assert chains == 2
    assert_equal(found, expected)


def test_overridden_forward_single():
    from mmdet.models.dense_heads import RetinaHead

    class Head(RetinaHead):
        def forward_single(self, x):
            return super().forward_single(2 * x)

    head = make_retina_head()
    head.__class__ = Head
    exact = copy.deepcopy(head)
    report = convert_model(head, 'L3')
    assert not report.adapted
    for inputs in ((torch.randn(2, 8, 9, 9),), [torch.randn(2, 8, 9, 9)] * 2):
        for found, expected in zip(head(inputs), exact(inputs)):
            for a, b in zip(found, expected, strict=True):
                assert torch.allclose(a, b, atol=1e-5)


def test_heads_return_lists():
    """The results are lists, as those of MMDetection are."""
    for name in ('RetinaHead', 'RPNHead'):
        for shapes in (slice(0, 1), slice(None)):
            part, inputs, _ = make_part(name, FIXED, torch.device('cpu'))
            scores, boxes = part(inputs[shapes])
            assert type(scores) is type(boxes) is list
            assert len(scores) == len(boxes) == len(inputs[shapes])


def test_excluded_convolution():
    part = make_stage()
    convert_model(part, FIXED, exclude=['1.conv2'])
    _, chains = run(part, [torch.randn(4, 16, 9, 7)])
    # The first block with the next convolution, and the last block.
    assert chains == 2


def test_rpn_keeps_codes_for_its_convolutions():
    """One payload of three bits, for the ReLU and both convolutions."""
    part, inputs, _ = make_part('RPNHead', FIXED, torch.device('cpu'))
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    for max_bytes in (chain._MAX_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chain, '_MAX_BYTES', max_bytes)
            with saved_tensors() as saved:
                part([x * 1])
        kept = {t.data_ptr(): t for t in saved}
        codes = [t.nbytes for t in kept.values() if t.dtype == torch.uint8]
        assert sorted(codes) == [x.numel() * 2 // 8, x.numel() * 3 // 8]


def test_report():
    for name in ('stage', 'RetinaHead', 'RPNHead', 'FCNMaskHead', 'mmdet FPN'):
        part = PARTS[name][0]()
        report = convert_model(part, 'L3')
        if report.adapted:
            (adapted,) = report.adapted
            assert adapted.source == PARTS[name][0]().__class__.__name__
            assert f'{adapted.source} -> {adapted.target}' in str(report)
            continue
        own = {item.source: item.norms for item in report.fused}
        assert own[type(part).__name__] == 0
        line = f'{type(part).__name__} fused: convolutions of small maps run'
        assert line in str(report)
