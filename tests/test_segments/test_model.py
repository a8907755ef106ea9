"""Blocks of models as segments: level L3R."""

import copy
import pickle

import pytest
import torch
from support.torchvision_stub import need_mmpretrain
from support.transformer import Block, relative
from torch import fx, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import mmactnn
from mmactnn import LEVELS, convert_model, get_level, measure_activations
from mmactnn.layers import QuantizedLayer
from mmactnn.segments import is_segment


class Encoder(nn.Module):
    """A small transformer for rows of 32 tokens."""

    def __init__(self, depth=3, dropout=0.0):
        super().__init__()
        self.stem = nn.Linear(16, 64)
        self.blocks = nn.ModuleList(Block(64, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def make(depth=3, **options):
    torch.manual_seed(0)
    return Encoder(depth, **options)


def batch(samples=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 32, 16, generator=generator)


def gradients(model, x, seed=2):
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(x)
    output.square().sum().backward()
    grads = [p.grad.flatten() for p in model.parameters()]
    return output.detach(), torch.cat(grads)


def names(items):
    return [item.name for item in items]


BLOCKS = ['blocks.0', 'blocks.1', 'blocks.2']


class TestConversion:
    def test_report(self):
        report = convert_model(make(), 'L3R')
        assert names(report.segments) == BLOCKS
        assert {item.bits for item in report.segments} == {8}
        assert names(report.converted) == ['stem', 'norm', 'head']
        inside = [i for i in report.left if i.name.startswith('blocks.')]
        assert {i.reason for i in inside if 'fc' in i.name} == {'in a segment'}
        assert '3 Block recomputed from codes of 8 bit' in str(report)

    def test_other_levels_do_not(self):
        for name in ('L0', 'L3', 'swap'):
            assert not convert_model(make(), name).segments
        exact = dict(base='L0', recompute=True)
        assert not convert_model(make(), exact).segments

    def test_level(self):
        assert LEVELS['L3R'].execution.recompute
        level = get_level(dict(base='L3R', recompute=False))
        assert level.compression == LEVELS['L3R'].compression
        assert not level.execution.recompute

    def test_change_of_level(self):
        model = make()
        x = batch()
        expected = model(x)
        for level in ('L3', 'L3R', 'L3R', 'L3', 'L0'):
            report = convert_model(model, level)
            assert names(report.segments) == (BLOCKS if level == 'L3R' else [])
            segments = [is_segment(m) for m in model.blocks]
            assert segments == [level == 'L3R'] * 3
            if level == 'L3R':
                # Exact within, also if they were compressed before.
                assert torch.equal(model(x), expected)
                layers = [
                    m
                    for m in model.blocks.modules()
                    if isinstance(m, QuantizedLayer)
                ]
                assert layers
                assert all(m.quantizer.exact for m in layers)
        assert torch.equal(model(x), expected)

    def test_failed_conversion_leaves_segments(self):
        model = make()
        convert_model(model, 'L3R')
        with pytest.raises(ValueError, match='matches no layer'):
            convert_model(model, 'L3', exclude=['nothing'])
        assert all(map(is_segment, model.blocks))

    def test_revert(self):
        model = make()
        expected = model(batch())
        convert_model(model, 'L3R')
        mmactnn.revert_model(model)
        assert type(model.blocks[0]) is Block
        assert '_segment' not in vars(model.blocks[0])
        assert torch.equal(model(batch()), expected)

    def test_exclude(self):
        report = convert_model(make(), 'L3R', exclude=['blocks.1'])
        assert names(report.segments) == ['blocks.0', 'blocks.2']
        assert [i.reason for i in report.unsegmented] == ['excluded']
        assert 'blocks.1.fc1' in names(report.converted)

    def test_exclude_class(self):
        report = convert_model(make(), 'L3R', exclude=['Block'])
        assert not report.segments
        assert 'blocks.1.fc1' in names(report.converted)

    def test_include(self):
        report = convert_model(make(), 'L3R', include=['blocks.[01]*'])
        assert names(report.segments) == ['blocks.0', 'blocks.1']

    def test_rules(self):
        level = dict(base='L3R', rules={'blocks.0': 6, 'blocks.1': None})
        report = convert_model(make(), level)
        assert [(i.name, i.bits) for i in report.segments] == [
            ('blocks.0', 6),
            ('blocks.2', 8),
        ]
        assert [i.reason for i in report.unsegmented] == ['exact by a rule']

    def test_rule_without_use(self):
        with pytest.raises(ValueError, match='matches no'):
            convert_model(make(), dict(base='L3R', rules={'blocks.7': 6}))

    def test_forward_on_the_instance(self):
        model = make()
        block = model.blocks[1]
        block.forward = block.forward
        report = convert_model(model, 'L3R')
        assert names(report.segments) == ['blocks.0', 'blocks.2']

    def test_fused_blocks_stay(self):
        from support.small_resnet import SmallResNet

        report = convert_model(SmallResNet(2), 'L3R')
        assert not report.segments
        assert names(report.fused) == names(
            convert_model(SmallResNet(2), 'L3').fused
        )

    def test_small_gain_stays(self):
        """Codes of two bits for two layers are fewer than 8 for the input."""

        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x):
                return self.b(self.a(x).relu())

        report = convert_model(nn.Sequential(Pair(), Pair()), 'L3R')
        assert not report.segments
        assert len(report.converted) == 4

    def test_blocks_of_stages(self):
        """Blocks, not the stages that consist of them."""

        class Stage(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.Sequential(Block(), Block())
                self.last = nn.Linear(64, 64)

            def forward(self, x):
                return self.last(self.parts(x))

        model = nn.Sequential(Stage(), Stage(), Block())
        report = convert_model(model, 'L3R')
        assert names(report.segments) == [
            '0.parts.0', '0.parts.1', '1.parts.0', '1.parts.1', '2',
        ]  # fmt: skip


class TestTraining:
    def test_gradients_and_memory(self):
        x = batch()
        exact_model, model = make(), make()
        convert_model(model, 'L3R', include=['blocks.*', 'stem'])
        output, exact = gradients(exact_model, x)
        coded_output, coded = gradients(model, x)
        assert torch.equal(coded_output, output)
        with measure_activations(exact_model) as expected:
            exact_model(x)
        with measure_activations(model) as meter:
            model(x)
        assert meter.exact_bytes == expected.exact_bytes
        assert meter.ratio > 20
        inner = [
            (n, p.grad)
            for n, p in model.named_parameters()
            if n.startswith('blocks.')
        ]
        other = dict(exact_model.named_parameters())
        for name, grad in inner:
            assert relative(grad, other[name].grad) < 0.05, name
        assert not torch.equal(coded, exact)

    def test_dropout(self):
        x = batch()
        model = make(dropout=0.2)
        _, exact = gradients(model, x)
        convert_model(model, 'L3R', include=['blocks.*'])
        _, coded = gradients(model, x)
        assert 0 < relative(coded, exact) < 0.02

    def test_evaluation_is_exact(self):
        model = make()
        plain = copy.deepcopy(model).eval()
        convert_model(model, 'L3R')
        model.eval()
        x = batch()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(model(x), plain(x))
        assert relative(gradients(model, x)[1], gradients(plain, x)[1]) == 0

    def test_frozen_inputs_keep_nothing(self):
        """Without a gradient to compute nothing is encoded."""
        model = make().requires_grad_(False)
        convert_model(model, 'L3R')
        with measure_activations(model) as meter:
            model(batch())
        assert meter.saved_bytes == 0

    @pytest.mark.parametrize(
        'clone',
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=['deepcopy', 'pickle'],
    )
    def test_copies(self, clone):
        model = make()
        convert_model(model, 'L3R', include=['blocks.*'])
        twin = clone(model)
        assert all(map(is_segment, twin.blocks))
        x = batch()
        mmactnn.manual_seed(3)
        _, first = gradients(model, x)
        mmactnn.manual_seed(3)
        _, second = gradients(twin, x)
        mmactnn.manual_seed(None)
        assert torch.equal(first, second)
        mmactnn.revert_model(twin)
        assert all(map(is_segment, model.blocks))

    def test_fx_traces_through(self):
        model = make()
        convert_model(model, 'L3R')
        graph = fx.symbolic_trace(model.eval())
        x = batch()
        assert torch.equal(graph(x), model(x))

    def test_jit_trace(self):
        model = make()
        convert_model(model, 'L3R')
        x = batch()
        traced = torch.jit.trace(model.eval(), x)
        torch.testing.assert_close(traced(x), model(x))

    def test_own_checkpointing_inside(self):
        """Blocks that call torch's checkpoint themselves (``with_cp``)."""

        class Own(Block):
            def forward(self, x):
                return torch_checkpoint(
                    super().forward, x, use_reentrant=False
                )

        def build():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(16, 64), Own(), Own())

        model, x = build(), batch()
        _, exact = gradients(model, x)
        report = convert_model(model, 'L3R', include=['1*', '2*'])
        assert len(report.segments) == 2
        _, coded = gradients(model, x)
        assert 0 < relative(coded, exact) < 0.02

    def test_activation_checkpointing_of_mmengine(self):
        from mmengine.runner.activation_checkpointing import (
            turn_on_activation_checkpointing,
        )

        x = batch()
        model = make()
        _, exact = gradients(model, x)
        before, after = make(), make()
        turn_on_activation_checkpointing(before, ['blocks.0', 'blocks.1'])
        report = convert_model(before, 'L3R', include=['blocks.*'])
        assert names(report.segments) == ['blocks.2']
        convert_model(after, 'L3R', include=['blocks.*'])
        turn_on_activation_checkpointing(after, ['blocks.0', 'blocks.1'])
        for net in (before, after):
            _, coded = gradients(net, x)
            assert 0 < relative(coded, exact) < 0.2

    def test_hooks_on_blocks(self):
        model = make()
        convert_model(model, 'L3R')
        calls = []
        model.blocks[0].register_forward_hook(
            lambda m, args, out: calls.append(type(m))
        )
        model.blocks[0].register_full_backward_hook(
            lambda m, *grads: calls.append(grads[0][0].shape)
        )
        gradients(model, batch())
        assert calls == [type(model.blocks[0]), (8, 32, 64)]


class TestKnownModels:
    def test_encoder_of_torch(self):
        """Post-norm and ReLU, called with several arguments."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 256, 0.1, batch_first=True)
        model = nn.Sequential(
            nn.Linear(16, 64), nn.TransformerEncoder(layer, 3)
        )
        x = batch()
        _, exact = gradients(model, x)
        with measure_activations(model) as expected:
            model(x)
        report = convert_model(model, 'L3R', include=['1.*'])
        assert len(report.segments) == 3
        _, coded = gradients(model, x)
        # Dropout of attention differs if its random numbers do.
        assert 0 < relative(coded, exact) < 0.05
        with measure_activations(model) as meter:
            model(x)
        assert meter.exact_bytes == expected.exact_bytes
        assert meter.layers_ratio > 15

    @pytest.mark.parametrize(
        ('name', 'options', 'size', 'ratio'),
        [
            ('VisionTransformer', dict(img_size=64), 64, 25),
            ('SwinTransformer', dict(window_size=4), 128, 15),
            ('ConvNeXt', dict(), 64, 12),
        ],
    )
    def test_backbones(self, name, options, size, ratio):
        need_mmpretrain()
        import mmpretrain.models

        torch.manual_seed(0)
        arch = dict(
            VisionTransformer=dict(
                embed_dims=96,
                num_layers=4,
                num_heads=3,
                feedforward_channels=384,
            ),
            SwinTransformer=dict(
                embed_dims=48, depths=[2, 2, 2, 2], num_heads=[3, 6, 12, 24]
            ),
            ConvNeXt=dict(depths=[2, 2, 4, 2], channels=[24, 48, 96, 192]),
        )[name]
        model = getattr(mmpretrain.models, name)(arch=arch, **options)
        model.train()
        x = torch.randn(2, 3, size, size)
        target = torch.randn(2, 1)

        def run():
            torch.manual_seed(1)
            model.zero_grad()
            out = model(x)[-1]
            out = out[0] if isinstance(out, (list, tuple)) else out
            weights = torch.linspace(-1, 1, out[0].numel())
            (out.flatten(1) @ weights[:, None] * target).sum().backward()
            return {
                n: p.grad.clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            }

        exact = run()
        report = convert_model(model, 'L3R')
        assert len(report.segments) >= 4
        with measure_activations(model) as meter:
            model(x)
        assert meter.ratio > ratio
        coded = run()
        assert coded.keys() == exact.keys()
        inside = [
            key
            for key in exact
            if any(key.startswith(f'{s.name}.') for s in report.segments)
        ]
        a, b = (
            torch.cat([grads[key].flatten() for key in inside])
            for grads in (coded, exact)
        )
        # Small tokens among large ones, such as a class token at first, have
        # the noise of these.
        assert relative(a, b) < 0.1
