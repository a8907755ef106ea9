"""Losses of OpenMMLab's heads, against the stock heads."""

import copy
import pickle
import warnings

import pytest
import torch
from mmdet.models.dense_heads import FCOSHead, GFLHead, RetinaHead, YOLOXHead
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData, PixelData
from mmseg.models.decode_heads import (
    DAHead,
    DDRHead,
    EncHead,
    FCNHead,
    IterativeDecodeHead,
    PSPHead,
    SegformerHead,
)
from mmseg.models.losses import CrossEntropyLoss
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from support.layers import assert_same_bits, relative_error
from torch import nn

from mmactnn import QLosses, convert_model, measure_activations, revert_model
from mmactnn.adapters.decode_head import QDecodeHead
from mmactnn.layers import QResizedCrossEntropy
from mmactnn.memory import Breakdown, Locator
from mmactnn.memory.breakdown import Category

LAYERS = ['*resized_cross_entropy', '*losses_of_outputs']
IGNORED = 255


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        register_all_modules(init_default_scope=False)
        yield


def chosen(head):
    """Filters for the layers that stand for losses."""
    return lambda module, name: (
        name.rpartition('.')[2]
        in (
            'resized_cross_entropy',
            'losses_of_outputs',
        )
    )


def results(losses):
    flat = {}
    for name, value in losses.items():
        values = value if isinstance(value, list) else [value]
        flat.update({f'{name}{i}': v for i, v in enumerate(values)})
    return flat


class TestDecodeHeads:
    OHEM = dict(type='OHEMPixelSampler', min_kept=50)
    CE = dict(type='CrossEntropyLoss')
    DICE = dict(type='DiceLoss', loss_name='loss_dice')
    OHEM_LOSS = dict(type='OhemCrossEntropy', thres=0.9, min_kept=50)

    # Heads by name: class, arguments besides the common ones, channels of
    # the inputs, and whether all logits are resized within the loss.
    CASES = {
        'FCN': (FCNHead, dict(num_convs=1), [8]),
        'weight of the loss': (
            FCNHead,
            dict(num_convs=1, loss_decode={**CE, 'loss_weight': 0.4}),
            [8],
        ),
        'weights of classes': (
            FCNHead,
            dict(
                num_convs=1,
                align_corners=True,
                loss_decode={**CE, 'class_weight': [1.0, 2, 0.5, 1, 3]},
            ),
            [8],
        ),
        'average without ignored': (
            FCNHead,
            dict(num_convs=1, loss_decode={**CE, 'avg_non_ignore': True}),
            [8],
        ),
        'each pixel': (
            FCNHead,
            dict(num_convs=1, loss_decode={**CE, 'reduction': 'none'}),
            [8],
        ),
        'sampler': (FCNHead, dict(num_convs=1, sampler=OHEM), [8]),
        'sampler by score': (
            FCNHead,
            dict(num_convs=1, sampler={**OHEM, 'thresh': 0.7}),
            [8],
        ),
        'two losses': (
            FCNHead,
            dict(num_convs=1, loss_decode=[CE, DICE]),
            [8],
        ),
        'one name': (FCNHead, dict(num_convs=1, loss_decode=[CE, CE]), [8]),
        'Dice': (FCNHead, dict(num_convs=1, loss_decode=DICE), [8]),
        'PSP': (PSPHead, dict(pool_scales=(1, 2)), [8]),
        'SegFormer': (SegformerHead, {}, [4, 8]),
        'super()': (
            EncHead,
            dict(
                num_codes=3,
                add_lateral=False,
                loss_se_decode={**CE, 'use_sigmoid': True},
            ),
            [8, 8],
        ),
        'super() three times': (DAHead, dict(pam_channels=2), [8]),
        'its own losses': (DDRHead, dict(loss_decode=[OHEM_LOSS] * 2), [4, 8]),
    }
    every_case = pytest.mark.parametrize(
        'case', CASES.values(), ids=list(CASES)
    )

    @staticmethod
    def make(case):
        torch.manual_seed(0)
        cls, options, channels = case
        several = cls in (SegformerHead, EncHead)
        options = dict(
            channels=4,
            num_classes=5,
            norm_cfg=dict(type='BN'),
            dropout_ratio=0,
            in_channels=channels if several else channels[-1],
            **options,
        )
        if several:
            options['in_index'] = list(range(len(channels)))
        head = cls(**options).train()
        return head, [torch.randn(2, c, 6, 7) for c in channels]

    @staticmethod
    def samples(ignored=0.2):
        torch.manual_seed(1)
        found = []
        for _ in range(2):
            labels = torch.randint(5, (1, 24, 28))
            labels[torch.rand(labels.shape) < ignored] = IGNORED
            found.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
        return found

    def run(self, head, inputs, samples=None):
        head.zero_grad()
        leaves = [x.clone().requires_grad_() for x in inputs]
        with measure_activations(head, Locator(head)) as meter:
            losses = head.loss(tuple(leaves), samples or self.samples(), None)
        sum(v.mean() for k, v in losses.items() if 'loss' in k).backward()
        grads = [x.grad for x in (*leaves, *head.parameters())]
        return losses, grads, Breakdown.of(meter, head)

    @every_case
    def test_against_the_stock_head(self, case):
        stock, inputs = self.make(case)
        ours = copy.deepcopy(stock)
        report = convert_model(ours, filter_fn=chosen(ours))
        assert [item.name for item in report.adapted] == ['']
        expected, found = self.run(stock, inputs), self.run(ours, inputs)
        assert list(found[0]) == list(expected[0])
        for name, value in expected[0].items():
            torch.testing.assert_close(
                found[0][name], value, rtol=1e-5, atol=1e-6
            )
        for a, b in zip(found[1], expected[1]):
            if b is None or b.norm() < 1e-6:
                continue
            assert relative_error(a, b) < 1e-4
        losses = [r[2].kept_in(Category.LOSS) for r in (found, expected)]
        if stock.__class__ is not EncHead:
            assert losses[0] < losses[1] / 2

    @every_case
    def test_level_0_and_evaluation_and_revert(self, case):
        stock, inputs = self.make(case)
        ours = copy.deepcopy(stock)
        convert_model(ours, 'L3')
        for level in ('L0', 'revert'):
            if level == 'revert':
                revert_model(ours)
                assert type(ours) is type(stock)
                assert str(ours) == str(stock)
            else:
                convert_model(ours, level)
            expected, found = self.run(stock, inputs), self.run(ours, inputs)
            for name, value in expected[0].items():
                assert_same_bits(found[0][name], value)
            for a, b in zip(found[1], expected[1]):
                assert_same_bits(a, b)

    def test_evaluation(self):
        stock, inputs = self.make(self.CASES['FCN'])
        ours = copy.deepcopy(stock)
        convert_model(ours, 'L3')
        expected = stock.eval().loss(tuple(inputs), self.samples(), None)
        found = ours.eval().loss(tuple(inputs), self.samples(), None)
        for name, value in expected.items():
            assert_same_bits(found[name], value)

    def test_nothing_but_ignored_pixels(self):
        stock, inputs = self.make(self.CASES['average without ignored'])
        ours = copy.deepcopy(stock)
        convert_model(ours, filter_fn=chosen(ours))
        samples = self.samples(ignored=1)
        expected = self.run(stock, inputs, samples)
        found = self.run(ours, inputs, samples)
        for name, value in expected[0].items():
            torch.testing.assert_close(found[0][name], value)
        assert not any(grad.any() for grad in found[1] if grad is not None)

    @pytest.mark.parametrize('why', ['hook', 'class', 'instance'])
    def test_other_losses_are_called(self, why, monkeypatch):
        """Where somebody relies on a call of the loss, or has changed it."""
        calls = []
        head, inputs = self.make(self.CASES['FCN'])
        convert_model(head, filter_fn=chosen(head))
        if why == 'hook':
            head.loss_decode.register_forward_hook(lambda *_: calls.append(1))
        elif why == 'class':
            forward = CrossEntropyLoss.forward

            def counted(self, *args, **kwargs):
                calls.append(1)
                return forward(self, *args, **kwargs)

            monkeypatch.setattr(CrossEntropyLoss, 'forward', counted)
        else:
            forward = head.loss_decode.forward
            head.loss_decode.forward = lambda *args, **kwargs: (
                calls.append(1) or forward(*args, **kwargs)
            )
        self.run(head, inputs)
        assert calls

    def test_a_head_that_is_part_of_a_model(self):
        model = nn.ModuleDict(
            dict(head=self.make(self.CASES['FCN'])[0], pool=nn.MaxPool2d(2))
        )
        convert_model(model, exclude=['head.resized*'])
        assert 'resized_cross_entropy' in dict(model.head.named_children())
        assert type(model.head.losses_of_outputs) is QLosses
        convert_model(model, dict(base='L3', rules={'*resized*': 4}))
        assert model.head.resized_cross_entropy.quantizer.bits == 4

    def test_a_head_without_losses_of_its_own(self):
        """It calls those of another head."""
        torch.manual_seed(0)
        inner = dict(type='FCNHead', num_convs=1, in_channels=8, channels=4)
        inner.update(num_classes=5, dropout_ratio=0, norm_cfg=dict(type='BN'))
        stock = IterativeDecodeHead(0, inner, []).train()
        inputs = [torch.randn(2, 8, 6, 7)]
        ours = copy.deepcopy(stock)
        convert_model(ours, filter_fn=chosen(ours))
        layers = [name.rpartition('.')[2] for name, _ in ours.named_modules()]
        assert 'resized_cross_entropy' in layers
        expected, found = self.run(stock, inputs), self.run(ours, inputs)
        assert list(found[0]) == list(expected[0])
        for name, value in expected[0].items():
            torch.testing.assert_close(found[0][name], value)
        for a, b in zip(found[1], expected[1]):
            if b is not None and b.norm() > 1e-6:
                assert relative_error(a, b) < 1e-4
        sizes = [r[2].kept_in(Category.LOSS) for r in (found, expected)]
        assert sizes[0] < sizes[1] / 2

    def test_copies(self):
        head, inputs = self.make(self.CASES['super()'])
        convert_model(head, filter_fn=chosen(head))
        assert isinstance(head, (EncHead, QDecodeHead))
        expected = self.run(head, inputs)
        for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert type(twin) is type(head)
            assert type(twin.resized_cross_entropy) is QResizedCrossEntropy
            found = self.run(twin, inputs)
            for name, value in expected[0].items():
                assert_same_bits(found[0][name], value)


ASSIGNER = dict(
    type='MaxIoUAssigner',
    pos_iou_thr=0.5,
    neg_iou_thr=0.4,
    min_pos_iou=0,
    ignore_iof_thr=-1,
)
ATSS = dict(type='ATSSAssigner', topk=9)
STRIDES = (8, 16, 32)


def train_cfg(assigner):
    return ConfigDict(
        assigner=assigner,
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    )


class TestDenseHeads:
    COMMON = dict(
        num_classes=20, in_channels=8, feat_channels=8, stacked_convs=1
    )
    CASES = {
        'RetinaNet': lambda **common: RetinaHead(
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=4,
                scales_per_octave=1,
                ratios=[0.5, 1, 2],
                strides=STRIDES,
            ),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
            train_cfg=train_cfg(ASSIGNER),
            **common,
        ),
        'FCOS': lambda **common: FCOSHead(
            strides=STRIDES,
            regress_ranges=((-1, 64), (64, 128), (128, 1e8)),
            norm_cfg=dict(type='GN', num_groups=4),
            **common,
        ),
        'GFL': lambda **common: GFLHead(
            norm_cfg=dict(type='GN', num_groups=4),
            anchor_generator=dict(
                type='AnchorGenerator',
                ratios=[1.0],
                octave_base_scale=8,
                scales_per_octave=1,
                strides=STRIDES,
            ),
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
            train_cfg=train_cfg(ATSS),
            **common,
        ),
        'YOLOX': lambda **common: YOLOXHead(
            strides=STRIDES,
            train_cfg=ConfigDict(assigner=dict(type='SimOTAAssigner')),
            **common,
        ),
    }

    def run(self, head, size=128):
        torch.manual_seed(1)
        head.zero_grad()
        feats = [torch.randn(2, 8, size // s, size // s) for s in STRIDES]
        leaves = [x.requires_grad_() for x in feats]
        truth = []
        for _ in range(2):
            low = torch.rand(5, 2) * size * 0.6
            high = low + torch.rand(5, 2) * size * 0.3 + 10
            truth.append(
                InstanceData(
                    bboxes=torch.cat([low, high], 1),
                    labels=torch.randint(20, (5,)),
                )
            )
        metas = 2 * [
            dict(
                img_shape=(size, size),
                pad_shape=(size, size),
                batch_input_shape=(size, size),
                scale_factor=1.0,
            )
        ]
        with measure_activations(head, Locator(head)) as meter:
            losses = results(head.loss_by_feat(*head(leaves), truth, metas))
        sum(v.sum() for v in losses.values()).backward()
        grads = [x.grad for x in (*leaves, *head.parameters())]
        return losses, grads, Breakdown.of(meter, head)

    @pytest.mark.parametrize('name', CASES)
    def test_against_the_stock_head(self, name):
        torch.manual_seed(0)
        stock = self.CASES[name](**self.COMMON).train()
        ours = copy.deepcopy(stock)
        convert_model(ours, filter_fn=chosen(ours))
        expected, found = self.run(stock), self.run(ours)
        for key, value in expected[0].items():
            assert_same_bits(found[0][key], value)
        for a, b in zip(found[1], expected[1]):
            if b is not None and b.norm() > 1e-6:
                assert relative_error(a, b) < 1e-4
        assert found[2].exact_bytes == expected[2].exact_bytes
        kept = [r[2].kept_bytes for r in (found, expected)]
        # Of a few places of their outputs the others keep less as it is.
        if name in ('RetinaNet', 'FCOS'):
            assert kept[0] < kept[1] / 2
        else:
            assert kept[0] == kept[1]
        convert_model(ours, 'L0')
        for a, b in zip(self.run(ours)[1], expected[1]):
            assert_same_bits(a, b)
        twin = pickle.loads(pickle.dumps(ours))
        assert type(twin) is type(ours)
        revert_model(ours)
        assert type(ours) is type(stock) and str(ours) == str(stock)
