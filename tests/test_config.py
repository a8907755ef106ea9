"""Levels: the table, variations of it, rules by name."""

import copy
import dataclasses
import importlib
import pickle

import pytest
import torch
from support.layers import exact_numerics
from torch import nn

import mmactnn
from mmactnn import LEVELS, Level, Rule, convert_model, get_level, ops

# The package has a function of this name.
conv_module = importlib.import_module('mmactnn.autograd.conv')


def small_model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
    )


class TestTable:
    def test_names(self):
        assert list(LEVELS) == [
            'L0', 'L1', 'L2', 'L3', 'L3S', 'L3R', 'L3.1', 'L4', 'L5', 'swap',
        ]  # fmt: skip
        assert all(LEVELS[name].name == name for name in LEVELS)

    @pytest.mark.parametrize(
        ('name', 'conv', 'norm', 'act', 'mask', 'adaptive'),
        [
            ('L0', None, None, None, False, False),
            ('L1', 4, None, 8, True, False),
            ('L2', 4, 4, 4, True, False),
            ('L3', 2, 2, 4, True, True),
            ('L3S', 2, 1, 4, True, True),
            ('L3R', 4, 3, 4, True, True),
            ('L3.1', 2, 2, 4, True, True),
            ('L4', 2, 2, 4, True, True),
            ('L5', 2, 2, 4, True, True),
            ('swap', None, None, None, False, False),
        ],
    )
    def test_bits(self, name, conv, norm, act, mask, adaptive):
        level = LEVELS[name]
        assert (level.conv, level.norm, level.act) == (conv, norm, act)
        assert (level.mask, level.adaptive) == (mask, adaptive)
        assert level.exact == (name in ('L0', 'swap'))
        assert level.swap == (name in ('L4', 'L5', 'swap'))
        assert level.expandable == (name == 'L5')
        assert level.recompute == (name == 'L3R')
        chunks = {'L0': None, 'swap': None, 'L3.1': 64}
        assert level.chunk_mib == chunks.get(name, 256)
        rectified = {'L3S': 2, 'L3R': 4}.get(name, 3 if adaptive else 4)
        assert level.rectified == rectified
        rounding = 'rotated' if name == 'L3S' else ops.DEFAULT_ROUNDING
        assert level.rounding == rounding
        attention = {
            'L0': (None, None),
            'swap': (None, None),
            'L1': (8, None),
            'L2': (6, 4),
            'L3R': (6, 4),
        }.get(name, (4, 2))
        assert (level.attention, level.attention_value) == attention

    def test_attention_alone_may_be_exact(self):
        level = get_level(dict(attention=None))
        assert level.attention is None and not level.exact


class TestGetLevel:
    def test_by_name_dict_and_object(self):
        assert get_level('L2') is LEVELS['L2']
        assert get_level(dict(base='L2')) == LEVELS['L2']
        level = Level('mine', conv=3, norm=5, mask=True)
        assert get_level(level) is level

    def test_a_variation_has_a_name_of_its_own(self):
        level = get_level(dict(conv=2.5))
        assert (level.conv, level.norm, level.adaptive) == (2.5, 2, True)
        assert level.name == 'L3(conv=2.5)'
        assert get_level(dict(conv=2.5, name='mine')).name == 'mine'

    @pytest.mark.parametrize(
        ('level', 'name'),
        [
            (dict(norm=2.5, conv=2.5), 'L3(conv=2.5,norm=2.5)'),
            (dict(base=dict(conv=4), norm=4.0), 'L3(conv=4,norm=4)'),
            (dict(base='L2', relu_bits=2), 'L2(rectified=2)'),
            (dict(base='L4', conv=2.0), 'L4'),
            (dict(norm=1, relu_bits=2, rounding='rotated'), 'L3S'),
            (dict(base='L3S', swap=True), 'L3S(swap=True)'),
            (
                dict(base='L1', norm=4, act=4, attention=6, attention_value=4),
                'L2',
            ),
            (dict(offload=dict(swap=True)), 'L4'),
            (
                dict(rules={'a': None, 'b': dict(group_size=64)}),
                "L3(rules={'a':None,'b':same/64})",
            ),
        ],
    )
    def test_names_are_canonical(self, level, name):
        assert get_level(level).name == name

    def test_one_setting_under_all_its_names(self):
        flat = get_level(dict(base='L2', conv=3, mask=False, head=5))
        parts = get_level(
            dict(
                base='L2',
                compression=dict(
                    linear_ops=3, lossless_activations=False, conv_module=5
                ),
            )
        )
        bits = dict(head=5, attention=6, attention_value=4)
        direct = Level('mine', 3, 4, False, 4, chunk_mib=256, **bits)
        assert flat == parts
        assert flat.compression == direct.compression
        assert flat.execution == direct.execution
        assert (flat.conv, flat.linear_ops, flat.head) == (3, 3, 5)
        changed = dataclasses.replace(flat, name='other', conv=1, swap=True)
        assert (changed.conv, changed.head, changed.swap) == (1, 5, True)
        assert pickle.loads(pickle.dumps(flat)) == copy.deepcopy(flat) == flat
        with pytest.raises(AttributeError, match='heads'):
            assert flat.heads
        with pytest.raises(dataclasses.FrozenInstanceError):
            flat.name = 'other'

    def test_rules_of_the_base_are_kept(self):
        base = dict(rules={'a': 4})
        level = get_level(dict(base=base, norm=4))
        assert level.rules == (Rule('a', 4),)
        assert get_level(dict(base=base, rules={})).rules == ()

    def test_rules(self):
        level = get_level(
            dict(
                base='L2',
                rules={
                    'a.*': 8,
                    'a.b': None,
                    'c': dict(bits=1, group_size=64),
                },
            )
        )
        assert level.rule_for('a.x') == Rule('a.*', 8)
        assert level.rule_for('a.b').bits is None
        assert level.rule_for('c') == Rule('c', 1, 64)
        assert level.rule_for('d') is None

    def test_a_rule_of_the_group_size_alone(self):
        level = get_level(
            dict(rules={'a.*': 8, '*': dict(group_size=64)}, base='L2')
        )
        assert level.rule_for('a.x') == Rule('*', 8, 64)
        assert not level.rule_for('b').sets_bits
        assert Rule('a').bits is None

    @pytest.mark.parametrize(
        ('level', 'error', 'message'),
        [
            ('L9', ValueError, 'L0, L1, .*L9'),
            (3, TypeError, 'got int'),
            (dict(bits=3), ValueError, "got 'bits'"),
            (dict(base='L7'), ValueError, 'L7'),
            (dict(conv=9), ValueError, 'got 9'),
            (dict(norm=0.5), ValueError, 'got 0.5'),
            (dict(act=2.5), ValueError, 'act bits.*got 2.5'),
            (dict(image=0), ValueError, 'image bits.*got 0'),
            (dict(base='L2', conv=2.5), ValueError, 'whole number'),
            (dict(base='L2', use_gradient=True), ValueError, 'adaptive'),
            (dict(chunk_mib=0), ValueError, 'positive, got 0'),
            (dict(chunk_mib=float('nan')), ValueError, 'chunk_mib.*got nan'),
            (dict(max_host_mib=float('inf')), ValueError, 'host.*got inf'),
            (dict(rules={'a': 9}), ValueError, "'a'.*got 9"),
            (dict(rules={'a': {}}), ValueError, "'a'.*got {}"),
            (dict(rules={'a': dict(bit=2)}), ValueError, "'a'.*'bit'"),
            (dict(rules=5), TypeError, 'rules.*dict.*got 5'),
            (dict(mask='no'), TypeError, "mask.*True or False.*got 'no'"),
            (dict(conv=True), TypeError, 'conv.*got True'),
            (dict(rounding='up'), ValueError, "'stochastic', got 'up'"),
            (dict(rounding=2), TypeError, "rounding.*'dither'.*got 2"),
            (dict(conv='2'), TypeError, "conv.*got '2'"),
            (dict(rectified=2.0), ValueError, 'whole number.*got 2.0'),
            (dict(conv=2, linear_ops=3), ValueError, 'one setting'),
            (dict(swap=True, offload=dict(swap=True)), ValueError, 'twice'),
            (dict(offload=dict(conv=2)), ValueError, 'of compression'),
            (dict(offload=2), TypeError, 'offload.*got 2'),
            (dict(nrom=2), ValueError, "mean 'norm'"),
        ],
    )
    def test_errors(self, level, error, message):
        with pytest.raises(error, match=message):
            get_level(level)


class TestRounding:
    @pytest.mark.parametrize('rounding', ops.ROUNDINGS)
    def test_decides_how_payloads_are_decoded(self, rounding):
        model = small_model()
        convert_model(model, dict(base='L2', conv=2, rounding=rounding))
        quantizer = model[0].quantizer
        x = torch.randn(2, 3, 16, 16)
        payload = quantizer.pack(x)
        drawn = payload.format.drawn
        assert (drawn is None) == (rounding == 'stochastic')
        assert bool(drawn and drawn.rotated) == (rounding == 'rotated')
        quantizer.generator.seek(0)
        draw = quantizer.generator.next(x.device)
        quantizer.generator.seek(0)
        payload = quantizer.pack(x)
        expected = ops.quantize(x, 2, **quantizer.random(draw))
        assert torch.equal(payload.codes, expected[0])
        assert torch.equal(
            payload.unpack(),
            ops.dequantize(
                *expected,
                *(x.shape, x.stride(), x.dtype, 2),
                drawn=ops.DrawnBits.of(rounding, *draw),
            ),
        )

    @pytest.mark.parametrize(
        ('roundings', 'bits', 'expected'),
        [(('dither', 'stochastic'), 4, 2.0), (('rotated', 'dither'), 2, 2.3)],
    )
    def test_variance_of_gradients(self, roundings, bits, expected):
        torch.manual_seed(0)
        images = torch.randn(2, 3, 16, 16)
        level = dict(base='L2', conv=bits)
        spread = {}
        for rounding in roundings:
            torch.manual_seed(0)
            model = small_model()
            convert_model(model, dict(level, rounding=rounding))
            draws = []
            for _ in range(200):
                model.zero_grad()
                model(images).square().sum().backward()
                draws.append(model[0].weight.grad.flatten())
            draws = torch.stack(draws).double()
            exact = small_model()
            exact.load_state_dict(model.state_dict())
            exact.train()(images).square().sum().backward()
            wanted = exact[0].weight.grad.flatten().double()
            # The bias of batch norm is of second order, hence far smaller.
            z = (draws.mean(0) - wanted) / (draws.std(0) / 200**0.5)
            assert z.abs().max() < 5
            spread[rounding] = draws.var(0).sum()
        ratio = float(spread[roundings[1]] / spread[roundings[0]])
        assert 0.8 * expected < ratio < 1.2 * expected

    @pytest.mark.parametrize('where', ['model', 'rule', 'layer'])
    def test_rotated_groups_are_of_one_size(self, where):
        model, level, size = small_model(), dict(rounding='rotated'), {}
        if where == 'model':
            size = dict(group_size=64)
        elif where == 'rule':
            level['rules'] = {'0': dict(group_size=64)}
        else:
            model[0] = mmactnn.QConv2d(3, 4, 3)
            quantizer = model[0].quantizer
            quantizer.own = quantizer.own._replace(group_size=64)
        message = "1 to 3 bits.*layer '0' must be 256.*got group_size=64"
        with pytest.raises(ValueError, match=message):
            convert_model(model, level, **size)
        assert type(model[1]) is nn.BatchNorm2d
        # An exact layer has no groups.
        exact = dict(base='L0', rounding='rotated')
        convert_model(model, exact, group_size=64)
        assert model[0].quantizer.exact

    def test_is_part_of_the_name(self):
        level = get_level(dict(rounding='stochastic'))
        assert level.name == "L3(rounding='stochastic')"
        usual = get_level(dict(base=level, rounding=ops.DEFAULT_ROUNDING))
        assert usual is not level and usual.name == 'L3'

    def test_of_a_pickle_from_before_there_was_a_choice(self):
        quantizer = mmactnn.QConv2d(3, 4, 3).quantizer
        state = quantizer.__getstate__()
        del state['rounding']
        old = object.__new__(type(quantizer))
        old.__setstate__(state)
        assert old.rounding == 'stochastic'


class TestConversion:
    def test_rules_go_by_qualified_name(self):
        model = small_model()
        rules = {'0': 8, '1': None, '2': None}
        convert_model(model, dict(base='L2', rules=rules))
        bits = [layer.quantizer.bits for layer in model]
        assert bits == [8, None, None, 4]

    def test_a_rule_goes_before_the_constructor(self):
        model = nn.Sequential(mmactnn.QConv2d(3, 4, 3, bits=1))
        convert_model(model, dict(base='L2', rules={'0': 8}))
        assert model[0].quantizer.bits == 8

    def test_no_rule_touches_an_exact_level(self):
        model = small_model()
        convert_model(model, dict(base='L0', rules={'0': 8}))
        assert all(layer.quantizer.exact for layer in model)

    def test_group_size_of_a_rule(self):
        model = small_model()
        rules = {'0': dict(bits=2, group_size=64)}
        level = dict(base='L2', rounding='dither', rules=rules)
        convert_model(model, level, group_size=128)
        assert model[0].quantizer.group_size == 64
        assert model[3].quantizer.group_size == 128

    def test_a_rule_without_bits_leaves_those_of_the_level(self):
        plain, ruled = small_model(), small_model()
        convert_model(plain, 'L3')
        rules = {'*': dict(group_size=64)}
        convert_model(ruled, dict(rounding='dither', rules=rules))
        for a, b in zip(plain, ruled):
            assert b.quantizer.group_size == 64
            assert b.quantizer.bits == a.quantizer.bits
            assert b.quantizer.strict == a.quantizer.strict
            assert (b.quantizer.layer_bits is None) == (
                a.quantizer.layer_bits is None
            )

    def test_a_rule_that_matches_nothing(self):
        model = small_model()
        with pytest.raises(ValueError, match="'nothing'"):
            convert_model(model, dict(rules={'nothing': 2}))
        assert type(model[0]) is nn.Conv2d

    def test_use_gradient_needs_the_size_of_the_dataset(self):
        with pytest.raises(ValueError, match='num_samples'):
            convert_model(small_model(), dict(use_gradient=True))

    def test_chunks_change_nothing_but_rounding_of_sums(self, device):
        x = torch.randn(5, 3, 9, 9, device=device)
        grads = []
        for chunk_mib in (None, 2 * 3 * 81 * 4 / 2**20):
            torch.manual_seed(0)
            model = small_model().to(device)
            level = dict(base='L2', chunk_mib=chunk_mib)
            convert_model(model, level, generator=mmactnn.RoundingGenerator(1))
            model(x).square().sum().backward()
            grads.append(model[0].weight.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('channels_last', [False, True])
    @pytest.mark.parametrize('stride', [1, 2])
    def test_large_convolutions_run_in_pieces(
        self, stride, channels_last, device
    ):
        sample = 16 * 8 * 8 * 4
        x = torch.randn(5, 16, 8, 8, device=device)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(16, 16 * stride**2, 3, stride, 1).to(device)
        with exact_numerics():
            expected = conv(x)
            convert_model(conv, dict(chunk_mib=sample / 2**20))
            sizes = []
            with pytest.MonkeyPatch.context() as patch:
                original = torch.convolution
                patch.setattr(conv_module, '_LARGE_BYTES', 2 * sample)
                patch.setattr(
                    torch,
                    'convolution',
                    lambda x, *args: (
                        sizes.append(len(x)) or original(x, *args)
                    ),
                )
                output = conv(x)
        # Not as small as the backward pass would have them, and about equal.
        assert sizes == [2, 2, 1]
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert output.stride() == expected.stride()

    @pytest.mark.parametrize(
        ('share', 'expected'), [(0.6, [5]), (0.4, [2, 2, 1])]
    )
    def test_small_output(self, share, expected):
        """Pieces copy the output; a workspace may be as large as the input."""
        conv = nn.Conv2d(16, 1, 3)
        convert_model(conv, dict(base='L3', chunk_mib=1e-6))
        x = torch.randn(5, 16, 8, 8)
        sizes = []
        with pytest.MonkeyPatch.context() as patch:
            original = torch.convolution
            patch.setattr(conv_module, '_LARGE_BYTES', share * x.nbytes)
            patch.setattr(
                torch,
                'convolution',
                lambda x, *args: sizes.append(len(x)) or original(x, *args),
            )
            conv(x)
        assert sizes == expected
