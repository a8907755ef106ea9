"""Adapters, against the stock modules."""

import copy

import pytest
import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.layers import SELayer
from mmdet.models.layers.se_layer import ChannelAttention
from mmdet.models.necks import FPN
from mmengine.registry import MODELS, DefaultScope
from support.layers import (
    assert_same_bits,
    exact_numerics,
    relative_error,
    saved_tensors,
)
from support.live import LiveBytes
from support.tools import ROOT
from torch import nn
from torch.nn import functional as F

from mmactnn import (
    QLosses,
    QMaxPool2d,
    QReLU,
    RoundingGenerator,
    convert_model,
    revert_model,
)
from mmactnn.adapters import find_adapters
from mmactnn.adapters.mmdet import (
    QFPN,
    QChannelAttention,
    QRPNHead,
    QSELayer,
)
from mmactnn.fusion import plain_class_of
from mmactnn.layers import QGate


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def fpn(**kwargs):
    kwargs = dict(num_outs=4, **kwargs)
    return FPN([4, 8], 6, **kwargs)


RELU = dict(add_extra_convs='on_output', relu_before_extra_convs=True)
# Constructor of the module, its adapter, and the names of its new layers.
CASES = {
    'RPNHead': (
        lambda: RPNHead(6, feat_channels=6),
        QRPNHead,
        ['relu', 'losses_of_outputs'],
    ),
    'FPN, pooling': (fpn, QFPN, ['extra_pool']),
    'FPN, ReLU': (lambda: fpn(**RELU), QFPN, ['extra_relu']),
    'FPN, ReLU, on input': (
        lambda: fpn(**{**RELU, 'add_extra_convs': 'on_input'}),
        QFPN,
        ['extra_relu'],
    ),
    'FPN, ReLU, on lateral': (
        lambda: fpn(
            **{**RELU, 'add_extra_convs': 'on_lateral'},
            upsample_cfg=dict(mode='bilinear', scale_factor=2),
        ),
        QFPN,
        ['extra_relu'],
    ),
    'ChannelAttention': (
        lambda: ChannelAttention(6),
        QChannelAttention,
        ['gate'],
    ),
    'SELayer': (lambda: SELayer(32), QSELayer, ['gate']),
}
KINDS = dict(
    relu=QReLU,
    extra_relu=QReLU,
    extra_pool=QMaxPool2d,
    gate=QGate,
    losses_of_outputs=QLosses,
)

every_case = pytest.mark.parametrize('case', CASES.values(), ids=list(CASES))


def make_inputs(module):
    if isinstance(module, FPN):
        sizes = (2, 4, 8, 8), (2, 8, 4, 4)
    elif isinstance(module, RPNHead):
        sizes = (2, 6, 5, 7), (2, 6, 3, 4)
    else:
        sizes = ((2, 6 if hasattr(module, 'fc') else 32, 5, 7),)
    return [torch.randn(size) for size in sizes]


def run(module, inputs):
    """All outputs and all gradients of a module."""
    module.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    several = isinstance(module, (FPN, RPNHead))
    found = module(leaves) if several else module(*leaves)
    outputs = []
    for part in found if several else [found]:
        outputs += part if isinstance(part, list) else [part]
    sum(output.square().sum() for output in outputs).backward()
    leaves += module.parameters()
    return [output.detach() for output in outputs], [x.grad for x in leaves]


class TestConversion:
    @every_case
    def test_exact_level_is_the_stock_module(self, case):
        make, target, _ = case
        stock = make()
        ours = copy.deepcopy(stock)
        convert_model(ours, 'L0')
        assert type(ours) is target
        inputs = make_inputs(stock)
        for found, expected in zip(run(ours, inputs), run(stock, inputs)):
            assert len(found) == len(expected)
            for a, b in zip(found, expected):
                assert_same_bits(a, b)

    @every_case
    def test_calls_compressed_layers(self, case):
        make, _, names = case
        module = make()
        report = convert_model(module, dict(base='L2', conv=8, act=8))
        assert [type(getattr(module, n)) for n in names] == [
            KINDS[n] for n in names
        ]
        (adapted,) = report.adapted
        assert (adapted.name, adapted.layers) == ('', tuple(names))
        assert adapted.source == type(make()).__name__
        assert set(names) <= {item.name for item in report.converted}
        assert f'layers in place of functions: {names[0]}' in str(report)

    @every_case
    def test_outputs_and_gradients(self, case):
        make, _, _ = case
        stock = make()
        ours = copy.deepcopy(stock)
        convert_model(ours, dict(base='L2', conv=8, act=8))
        inputs = make_inputs(stock)
        found, expected = run(ours, inputs), run(stock, inputs)
        for a, b in zip(found[0], expected[0]):
            assert_same_bits(a, b)
        for a, b in zip(found[1], expected[1]):
            assert relative_error(a, b) < 0.05

    @every_case
    def test_keeps_less(self, case):
        def kept(module):
            own = {p.data_ptr() for p in module.parameters()}
            with saved_tensors() as saved:
                run(module, make_inputs(module))
            sizes = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved}
            return sum(sizes[key] for key in sizes.keys() - own)

        make, _, names = case
        module = make()
        convert_model(module, 'L2')
        without = make()
        # It leaves functions to torch, too.
        convert_model(
            without, 'L2', filter_fn=lambda _, name: name not in names
        )
        assert kept(module) < kept(without)

    @every_case
    def test_conversion_and_reversion(self, case):
        make, target, names = case
        stock = make()
        ours = copy.deepcopy(stock).eval()
        model = nn.Sequential(ours)
        convert_model(model)
        assert list(ours.state_dict()) == list(stock.state_dict())
        assert not any(getattr(ours, name).training for name in names)
        convert_model(model, 'L2')
        assert type(ours) is target
        assert '0' in revert_model(model)
        assert [type(m) for m in ours.modules()] == [
            type(m) for m in stock.modules()
        ]
        assert vars(ours).keys() == vars(stock).keys()

    @pytest.mark.parametrize('pattern', ['0.relu', '0.*', 'ReLU'])
    def test_exclude(self, pattern):
        model = nn.Sequential(CASES['RPNHead'][0]())
        report = convert_model(model, exclude=[pattern, 'Losses'])
        assert plain_class_of(model[0]) is RPNHead
        assert '0.relu' in {item.name for item in report.left}
        assert not report.adapted

    def test_include(self):
        model = nn.Sequential(CASES['RPNHead'][0](), fpn())
        convert_model(model, include=['1.*'])
        assert type(model[0]) is RPNHead and type(model[1]) is QFPN

    def test_rules(self):
        model = CASES['RPNHead'][0]()
        convert_model(model, dict(base='L3', rules={'relu': None}))
        assert model.relu.quantizer.exact

    @pytest.mark.parametrize('argument', ['include', 'rules'])
    def test_error_changes_nothing(self, argument):
        model = CASES['RPNHead'][0]()
        kwargs = dict(include=['nothing'])
        if argument == 'rules':
            kwargs = dict(level=dict(rules={'nothing': 2}))
        with pytest.raises(ValueError, match='nothing'):
            convert_model(model, **kwargs)
        assert type(model) is RPNHead and not hasattr(model, 'relu')

    def test_modules_without_functions_get_no_layers(self):
        model = nn.Sequential(
            fpn(add_extra_convs='on_input'), FPN([4, 8], 6, num_outs=2)
        )
        plans = find_adapters(model).plans.values()
        assert [plan.layers for plan in plans] == [{}, {}]
        names = [name for name, _ in model.named_modules()]
        convert_model(model)
        assert [name for name, _ in model.named_modules()] == names

    def test_subclasses_with_overrides_stay(self):
        class Own(RPNHead):
            def forward_single(self, x):
                return super().forward_single(x.abs())

        model = Own(6, feat_channels=6)
        convert_model(model)
        assert plain_class_of(model) is Own

    def test_subclasses_without_overrides_are_adapted(self):
        class Own(RPNHead):
            def extra(self):
                return 3

        model = Own(6, feat_channels=6)
        convert_model(model)
        assert isinstance(model, Own) and isinstance(model, QRPNHead)
        assert model.extra() == 3
        revert_model(model)
        assert plain_class_of(model) is Own

    def test_patched_forward_pass(self, monkeypatch):
        stock = CASES['RPNHead'][0]()
        ours = copy.deepcopy(stock)
        convert_model(ours)
        original = RPNHead.forward_single
        monkeypatch.setattr(
            RPNHead,
            'forward_single',
            lambda self, x: [2 * y for y in original(self, x)],
        )
        inputs = make_inputs(stock)
        for found, expected in zip(run(ours, inputs), run(stock, inputs)):
            for a, b in zip(found, expected):
                assert relative_error(a, b) < 0.5


class OutOfPlace(QFPN):
    """Pyramid with sums out of place."""

    def adapted_forward(self, inputs):
        maps = [conv(x) for conv, x in zip(self.lateral_convs, inputs)]
        for i in range(len(maps) - 1, 0, -1):
            size = None
            if 'scale_factor' not in self.upsample_cfg:
                size = maps[i - 1].shape[2:]
            maps[i - 1] = maps[i - 1] + F.interpolate(
                maps[i], size=size, **self.upsample_cfg
            )
        outs = [conv(x) for conv, x in zip(self.fpn_convs, maps)]
        return (*outs, self.extra_pool(outs[-1]))


class TestPyramid:
    """Sums of three levels."""

    UPSAMPLING = [
        dict(mode='nearest'),
        dict(mode='bilinear', scale_factor=2, align_corners=False),
    ]

    @pytest.fixture(params=UPSAMPLING, ids=['nearest', 'bilinear'])
    def upsample_cfg(self, request):
        return request.param

    @pytest.fixture
    def inputs(self):
        sizes = (2, 4, 16, 20), (2, 8, 8, 10), (2, 16, 4, 5)
        return [torch.randn(size) for size in sizes]

    @pytest.mark.parametrize('act_cfg', [None, dict(type='ReLU')])
    @pytest.mark.parametrize('level', ['L0', 'L3'])
    def test_same_bits(self, level, act_cfg, upsample_cfg, inputs):
        found, expected = [], []
        # The activations keep their outputs, which the sums must not change.
        kwargs = dict(act_cfg=act_cfg, upsample_cfg=upsample_cfg)
        stock = FPN([4, 8, 16], 6, num_outs=4, **kwargs)
        for cls, results in ((QFPN, found), (OutOfPlace, expected)):
            neck = cls([4, 8, 16], 6, num_outs=4, **kwargs)
            neck.load_state_dict(stock.state_dict())
            convert_model(neck, level, generator=RoundingGenerator(1))
            for _ in range(2):
                results += run(neck, inputs)
        if level == 'L0':
            expected += run(stock, inputs)
            found += found[:2]
        for some, others in zip(found, expected, strict=True):
            for a, b in zip(some, others, strict=True):
                assert_same_bits(a, b)

    def test_hooks_see_the_laterals(self, inputs):
        neck = QFPN([4, 8, 16], 6, num_outs=4)
        convert_model(neck, 'L3')
        seen = []
        for conv in neck.lateral_convs:
            conv.register_forward_hook(lambda m, i, o: seen.append((o, o + 0)))
        neck(inputs)
        for kept, copied in seen:
            assert_same_bits(kept, copied)

    def test_sums_are_not_held(self):
        inputs = [torch.randn(2, 4, 64 >> i, 64 >> i) for i in range(3)]
        neck = QFPN([4, 4, 4], 64, num_outs=4)
        convert_model(neck, 'L3')
        with LiveBytes() as live:
            neck(inputs)
        # Two maps of the finest level, and 5/16 of one for the coarser levels;
        # the rest is codes.
        finest = 2 * 64 * 64 * 64 * 4
        assert live.peak < 2.6 * finest


class TestNames:
    @pytest.mark.parametrize('scope', [None, 'mmdet'])
    @pytest.mark.parametrize('prefix', ['', 'mmactnn.'])
    def test_configs(self, prefix, scope):
        head = dict(type=f'{prefix}QRPNHead', in_channels=6, feat_channels=6)
        neck = dict(
            type=f'{prefix}QFPN', in_channels=[4], out_channels=6, num_outs=2
        )
        with DefaultScope.overwrite_default_scope(scope):
            head, neck = MODELS.build(head), MODELS.build(neck)
        assert type(head) is QRPNHead and type(head.relu) is QReLU
        assert type(neck) is QFPN and type(neck.extra_pool) is QMaxPool2d
        assert list(head.state_dict()) == list(
            RPNHead(6, feat_channels=6).state_dict()
        )
        revert_model(neck)
        assert type(neck) is FPN and not hasattr(neck, 'extra_pool')

    def test_wrong_number_of_maps(self):
        neck = QFPN([4, 8], 6, num_outs=4)
        with pytest.raises(ValueError, match='2 feature maps, got 1'):
            neck([torch.randn(1, 4, 8, 8)])


def test_lazy_imports(run_in_fork):
    code = """
import sys
from torch import nn
import mmactnn
mmactnn.convert_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()))
assert not {'mmdet', 'mmseg', 'mmcv', 'mmpretrain'} & set(sys.modules)
"""
    done = run_in_fork(code, ROOT)
    assert done.returncode == 0, done.stderr
