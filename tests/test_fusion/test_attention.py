"""Explicit softmax attention in traces, against the calls as written."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same_bits, relative_error
from support.pairs import in_turn
from torch import nn

import mmactnn
from mmactnn import convert_model, measure_activations
from mmactnn.fusion import attention as fused_attention
from mmactnn.fusion import is_fused
from mmactnn.fusion.trace import trace_block

LEVEL = dict(
    base='L3', attention=8, attention_value=8, conv=8, norm=8, adaptive=False
)


class Attention(nn.Module):
    """Projections and whatever a test makes of them."""

    def __init__(self, attend, dropout=0.0):
        super().__init__()
        self.heads, self.scale = 2, 8**-0.5
        self.qkv = nn.Linear(16, 48)
        self.softmax = nn.Softmax(dim=-1)
        self.drop = nn.Dropout(dropout)
        self.proj = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(2, 7, 7))
        self.attend = attend

    def split(self, x):
        x = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 8)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x):
        x = x.transpose(1, 2)
        return self.proj(x.reshape(x.shape[0], x.shape[1], 16))


def make(forward, **options):
    """An attention module of a new class with the given forward pass."""
    torch.manual_seed(0)
    cls = type('Own', (Attention,), dict(forward=forward))
    module = cls(None, **options)
    del module.attend
    return module.train()


def plain(self, x):
    q, k, v = self.split(x)
    scores = q @ k.transpose(-2, -1) * self.scale
    return self.merge(scores.softmax(dim=-1) @ v)


def of_layers(self, x):
    q, k, v = self.split(x)
    scores = (q * self.scale) @ k.transpose(-2, -1)
    return self.merge(self.drop(self.softmax(scores)) @ v)


def with_bias(self, x):
    q, k, v = self.split(x)
    scores = torch.matmul(q, k.mT) / 8**0.5
    scores = scores + self.bias.unsqueeze(0)
    return self.merge(torch.matmul(F.softmax(scores, -1), v))


def in_place(self, x):
    q, k, v = self.split(x)
    scores = torch.matmul(q, k.mT)
    scores *= self.scale
    scores += self.bias
    return self.merge(F.softmax(scores, dim=3).matmul(v))


def with_dropout(self, x):
    q, k, v = self.split(x)
    weights = (q @ k.mT).softmax(-1)
    weights = F.dropout(weights, 0.0, self.training)
    return self.merge(weights @ v)


def as_batch(self, x):
    q, k, v = self.split(x)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.bmm(q, k.transpose(1, 2)) * self.scale
    x = torch.bmm(torch.softmax(scores, dim=2), v)
    return self.merge(x.unflatten(0, (-1, 2)))


def as_one_product(self, x):
    q, k, v = self.split(x)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    bias = self.bias.repeat(x.shape[0], 1, 1)
    scores = torch.baddbmm(bias, q, k.mT, alpha=self.scale)
    x = torch.bmm(torch.softmax(scores, -1), v)
    return self.merge(x.unflatten(0, (-1, 2)))


def by_einsum(self, x):
    q, k, v = self.split(x)
    scores = torch.einsum('bhqd,bhkd->bhqk', q, k) * self.scale
    weights = scores.softmax(-1)
    return self.merge(torch.einsum('bhqk,bhkd->bhqd', weights, v))


def by_einsum_of_tokens(self, x):
    q, k, v = self.split(x)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.einsum('b q h d, b k h d -> b h q k', [q, k])
    weights = (scores + self.bias).softmax(-1)
    x = torch.einsum('bhqk,bkhd->bqhd', weights, v)
    return self.proj(x.reshape(x.shape[0], x.shape[1], 16))


def in_float(self, x):
    q, k, v = self.split(x)
    scores = (q @ k.mT).float() * self.scale
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)
    return self.merge(weights.type_as(v) @ v)


def hidden(self, x, mask):
    q, k, v = self.split(x)
    scores = (q @ k.mT) * self.scale
    scores = scores.masked_fill(mask, float('-inf'))
    return self.merge(scores.softmax(-1) @ v)


def in_windows(self, x, mask=None):
    samples, length, _ = x.shape
    q, k, v = self.split(x)
    scores = (q * self.scale) @ k.mT
    scores = scores + self.bias.unsqueeze(0)
    if mask is not None:
        count = mask.shape[0]
        scores = scores.view(samples // count, count, 2, length, length)
        scores = scores + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, 2, length, length)
    return self.merge(self.drop(self.softmax(scores)) @ v)


FORMS = dict(
    plain=plain,
    of_layers=of_layers,
    with_bias=with_bias,
    in_place=in_place,
    with_dropout=with_dropout,
    as_batch=as_batch,
    as_one_product=as_one_product,
    by_einsum=by_einsum,
    by_einsum_of_tokens=by_einsum_of_tokens,
    in_float=in_float,
    in_windows=in_windows,
)


def results(module, x, *args):
    """Output, and gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    output = module(x, *args)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    used = [x, *module.parameters()]
    grads = torch.autograd.grad(output, used, weights, allow_unused=True)
    return output.detach(), grads


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that attention from codes computes."""
    found = Counter()
    attention = fused_attention.attention

    def counting(*args, **kwargs):
        found['coded'] += 1
        return attention(*args, **kwargs)

    monkeypatch.setattr(fused_attention, 'attention', counting)
    return found


def compare(module, twin, x, calls, *args):
    """Compare a module with its converted copy, which must use codes."""
    calls.clear()
    output, expected = results(module, x, *args)
    found, gradients = results(twin, x, *args)
    torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert (a - b).norm() < 0.04 * b.norm() + 1e-4
    assert calls['coded'] == 1


@in_turn(form=tuple(FORMS))
def test_forms(form, calls):
    module = make(FORMS[form])
    twin = copy.deepcopy(module)
    report = convert_model(twin, LEVEL)
    assert [f.patterns for f in report.fused] == [('softmax_attention',)]
    x = torch.randn(4, 7, 16)
    compare(module, twin, x, calls)
    with measure_activations(module) as exact:
        module(x.requires_grad_())
    with measure_activations(twin) as meter:
        twin(x)
    assert meter.saved_bytes < exact.exact_bytes / 2


@in_turn(given=(True, False))
def test_masks_of_windows(given, calls):
    """An optional tensor has a trace of its own."""
    module = make(in_windows)
    twin = copy.deepcopy(module)
    convert_model(twin, LEVEL)
    x = torch.randn(6, 7, 16)
    mask = torch.where(torch.rand(3, 7, 7) > 0.5, -100.0, 0.0)
    compare(module, twin, x, calls, *([mask] if given else []))
    x = x.requires_grad_()
    with measure_activations(twin) as meter:
        twin(x, mask=mask)
    assert meter.saved_bytes < meter.exact_bytes / 2


def test_hidden_keys(calls):
    module = make(hidden)
    twin = copy.deepcopy(module)
    convert_model(twin, LEVEL)
    mask = torch.ones(7, 7).triu(1).bool()
    compare(module, twin, torch.randn(4, 7, 16), calls, mask)


def test_no_scores_are_kept():
    """Length squared would be far more than what is kept."""
    module = make(of_layers)
    x = torch.randn(1, 256, 16, requires_grad=True)
    convert_model(module, 'L3')
    with measure_activations(module) as meter:
        module(x)
    scores = 2 * 256 * 256 * 4
    assert meter.exact_bytes > scores
    assert meter.saved_bytes < scores / 50


def test_dropout_is_drawn_and_repeated():
    """With values of one sort, the output counts the weights that are left."""
    module = make(of_layers, dropout=0.5)
    with torch.no_grad():
        module.qkv.weight.zero_()
        module.qkv.bias.zero_()
        module.qkv.bias[32:] = 1
        module.proj.weight.copy_(torch.eye(16))
        module.proj.bias.zero_()
    convert_model(module, LEVEL)
    outputs, gradients = [], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        output, grads = results(module, torch.randn(4, 7, 16))
        outputs.append(output)
        gradients.append(grads)
    assert_same_bits(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    # Multiples of 2 / 7, rarely 1.
    assert (outputs[0] * 3.5 - (outputs[0] * 3.5).round()).abs().max() < 1e-5
    # The gradient of a bias of values sums over the same weights.
    weights = torch.linspace(-1, 1, outputs[0].numel()).view(4, 7, 16)
    names = [name for name, _ in module.named_parameters()]
    found = gradients[0][1 + names.index('qkv.bias')][32:]
    expected = (weights * outputs[0]).sum((0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def returns_weights(self, x):
    q, k, v = self.split(x)
    weights = (q @ k.mT).softmax(-1)
    return self.merge(weights @ v), weights


def over_queries(self, x):
    q, k, v = self.split(x)
    return self.merge((q @ k.mT).softmax(-2) @ v)


def finite(self, x):
    q, k, v = self.split(x)
    hidden = x.new_zeros(7, 7).bool()
    scores = (q @ k.mT).masked_fill(hidden, -1e9)
    return self.merge(scores.softmax(-1) @ v)


def scaled_bias(self, x):
    q, k, v = self.split(x)
    scores = (q @ k.mT + self.bias) * self.scale
    return self.merge(scores.softmax(-1) @ v)


def twice(self, x):
    q, k, v = self.split(x)
    scores = q @ k.mT
    return self.merge(scores.softmax(-1) @ v) + scores.mean()


def of_columns(self, x):
    q, k, v = self.split(x)
    scores = torch.einsum('bhqd,bhkd->bhkq', q, k)
    return self.merge(torch.einsum('bhkq,bhkd->bhqd', scores.softmax(-1), v))


def summed(self, x):
    q, k, v = self.split(x)
    scores = torch.einsum('bhqd,bhkd->bhqk', q, k)
    weights = scores.softmax(-1)
    return self.merge(torch.einsum('bhqk,bhke->bhqk', weights, v) @ v)


@in_turn(
    forward=(
        returns_weights,
        over_queries,
        finite,
        scaled_bias,
        twice,
        of_columns,
        summed,
    )
)
def test_other_functions_run_as_written(forward, calls):
    module = make(forward)
    twin = copy.deepcopy(module)
    convert_model(twin, LEVEL)
    x = torch.randn(4, 7, 16)
    outputs = module(x), twin(x.requires_grad_())
    if forward is returns_weights:
        outputs = [output[0] for output in outputs]
    assert_same_bits(*reversed(outputs))
    assert not calls


def broadcast(self, x):
    q, k, v = self.split(x)
    return self.merge((q @ k[:1].mT).softmax(-1) @ v[:1])


@in_turn(case=('hook', 'broadcast', 'float64', 'exact', 'softmax over heads'))
def test_values_that_do_not_fit_run_as_written(case, calls):
    module = make(broadcast if case == 'broadcast' else of_layers)
    x = torch.randn(4, 7, 16)
    if case == 'float64':
        module, x = module.double(), x.double()
    seen = []
    twin = copy.deepcopy(module)
    level = dict(LEVEL)
    if case == 'exact':
        level['rules'] = {'qkv': 8}
        level['attention'] = None
    if case == 'float64':
        level['rules'] = {'qkv': None, 'proj': None}
    convert_model(twin, level)
    for part in (module, twin):
        if case == 'hook':
            part.softmax.register_forward_hook(
                lambda layer, args, output: seen.append(output)
            )
        if case == 'softmax over heads':
            part.softmax.dim = 1
    outputs = [part(x.detach().requires_grad_()) for part in (module, twin)]
    assert_same_bits(*reversed(outputs))
    assert not calls
    assert len(seen) == (2 if case == 'hook' else 0)


def test_evaluation_and_reversion():
    module = make(in_windows)
    twin = copy.deepcopy(module)
    convert_model(twin, LEVEL)
    assert is_fused(twin)
    x = torch.randn(4, 7, 16, requires_grad=True)
    assert_same_bits(twin.eval()(x), module.eval()(x))
    twin.train(), module.train()
    for level in ('L0', None):
        if level:
            convert_model(twin, level)
        else:
            convert_model(twin, LEVEL)
            mmactnn.revert_model(twin)
        assert not is_fused(twin)
        found, gradients = results(twin, x)
        output, expected = results(module, x)
        assert_same_bits(found, output)
        for a, b in zip(gradients, expected, strict=True):
            assert_same_bits(a, b)


def test_copies_have_bits_of_their_own():
    module = make(plain)
    convert_model(module, LEVEL)
    twin = copy.deepcopy(module)
    convert_model(twin, dict(LEVEL, attention=2, attention_value=2))
    x = torch.randn(4, 7, 16)
    _, expected = results(make(plain), x)
    errors = [
        relative_error(results(part, x)[1][0], expected[0])
        for part in (module, twin)
    ]
    assert 5 * errors[0] < errors[1]


def test_rule_by_name():
    model = nn.ModuleDict(dict(a=make(plain)))
    x = torch.randn(4, 7, 16, requires_grad=True)
    kept = []
    for rules in ({}, {'a.attention': 8}, {'a.attention': None}):
        convert_model(model, dict(base='L3', rules=rules))
        with measure_activations(model) as meter:
            model['a'](x)
        kept.append(meter.saved_bytes)
    assert kept[0] < kept[1] < kept[2]


def test_half_precision_with_a_wide_mask(device, calls):
    """The lowest float32 is no -inf in float16: no row becomes NaN."""

    def forward(self, x, mask):
        q, k, v = self.split(x)
        scores = (q @ k.mT).float() + mask
        return self.merge(scores.softmax(-1).to(v.dtype) @ v)

    module = make(forward).to(device, torch.float16)
    twin = copy.deepcopy(module)
    convert_model(twin, LEVEL)
    mask = torch.zeros(4, 1, 7, 7, device=device)
    mask[:, :, :, 3:] = torch.finfo(torch.float32).min
    mask[:, :, 2] = torch.finfo(torch.float32).min
    x = torch.randn(4, 7, 16, device=device).half().requires_grad_()
    found, expected = twin(x, mask), module(x, mask)
    assert torch.isfinite(found).all()
    for output in (found, expected):
        output.data[:, 2] = 0
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert calls['coded'] == 1


class TestOptionalTensors:
    def test_traces(self):
        def forward(self, x, a=None, b=None, scale=1.0):
            x = x if a is None else x + a
            return self.proj(x if b is None else x * b) * scale

        module = make(forward)
        traces = trace_block(module, type(module))
        assert [t.optional for t in traces] == [
            (),
            ('a',),
            ('b',),
            ('a', 'b'),
        ]
        assert all(t.arguments == ('x', 'a', 'b', 'scale') for t in traces)
        assert [len(t.inputs) for t in traces] == [1, 2, 2, 3]

    def test_arguments_by_place_and_name(self, calls):
        def forward(self, x, unused=None, mask=None):
            q, k, v = self.split(x)
            scores = q @ k.mT
            if mask is not None:
                scores = scores + mask
            return self.merge(scores.softmax(-1) @ v)

        module = make(forward)
        twin = copy.deepcopy(module)
        convert_model(twin, LEVEL)
        x, mask = torch.randn(4, 7, 16), torch.randn(7, 7)
        compare(module, twin, x, calls, None, mask)
        x.requires_grad_()
        expected = module(x, mask=mask)
        for output in (
            twin(x, None, mask),
            twin(mask=mask, x=x),
            twin(x, x, mask),
            twin(x, x, mask=mask),
        ):
            torch.testing.assert_close(output, expected)
        torch.testing.assert_close(twin(x), module(x))
        assert calls['coded'] == 6

    def test_names_that_begin_alike(self):
        """The check of an absent ``key`` is called ``key_1`` in a trace."""

        def forward(self, x, key=None, key_pos=None, key_1=0):
            key = x if key is None else key
            key = key if key_pos is None else key + key_pos
            return torch.relu(self.proj(x + key))

        module = make(forward)
        traces = trace_block(module, type(module))
        assert [tuple(node.target for node in t.inputs) for t in traces] == [
            ('x',),
            ('x', 'key'),
            ('x', 'key_pos'),
            ('x', 'key', 'key_pos'),
        ]
        twin = copy.deepcopy(module)
        convert_model(twin, LEVEL)
        x, pos = torch.randn(2, 4, 7, 16)
        x.requires_grad_()
        torch.testing.assert_close(
            twin(x, key_pos=pos), module(x, key_pos=pos)
        )

    def test_an_argument_that_must_be_given(self, calls):
        """Only the trace with the tensor exists."""
        module = make(lambda self, x, mask=None: hidden(self, x, mask))
        twin = copy.deepcopy(module)
        convert_model(twin, LEVEL)
        mask = torch.ones(7, 7).triu(1).bool()
        compare(module, twin, torch.randn(4, 7, 16), calls, mask)
        with pytest.raises(TypeError):
            twin(torch.randn(4, 7, 16, requires_grad=True))


def test_window_attention_of_mmdet(calls):
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    torch.manual_seed(0)
    module = swin.WindowMSA(16, 4, (7, 7)).train()
    nn.init.normal_(module.relative_position_bias_table)
    twin = copy.deepcopy(module)
    convert_model(twin, LEVEL)
    x = torch.randn(6, 49, 16)
    mask = torch.where(torch.rand(3, 49, 49) > 0.5, -100.0, 0.0)
    compare(module, twin, x, calls)
    compare(module, twin, x, calls, mask)
    x.requires_grad_()
    with measure_activations(module) as exact:
        module(x)
    with measure_activations(twin) as meter:
        twin(x)
    assert math.isclose(exact.exact_bytes, meter.exact_bytes, rel_tol=0.02)
    assert meter.saved_bytes < exact.exact_bytes / 4


def test_bias_that_an_index_chooses_from_a_table():
    """It is made again, and its table gets a gradient."""
    beit = pytest.importorskip('mmseg.models.backbones.beit')
    torch.manual_seed(0)
    module = beit.BEiTAttention(16, 2, (7, 7)).train()
    nn.init.normal_(module.relative_position_bias_table)
    twin = copy.deepcopy(module)
    convert_model(twin, LEVEL)
    x = torch.randn(2, 50, 16, requires_grad=True)
    module(x).sin().sum().backward()
    with measure_activations(twin) as meter:
        output = twin(x)
    output.sin().sum().backward()
    bias = 2 * 50 * 50 * 4
    assert meter.saved_bytes < bias / 2
    found, expected = (
        m.relative_position_bias_table.grad for m in (twin, module)
    )
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
