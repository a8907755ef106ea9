"""Attention from codes, against torch in float64 and as statistics."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same_bits, relative_error, saved_tensors
from support.pairs import in_turn
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmactnn
from mmactnn import convert_model, measure_activations
from mmactnn.autograd import attention
from mmactnn.codes.cache import PayloadCache
from mmactnn.codes.payload import WHOLE
from mmactnn.codes.quantizer import AttentionBits, LayerQuantizer
from mmactnn.layers import QMultiheadAttention, QScaledDotProductAttention
from mmactnn.layers.attention import ScaledDotProductAttention

# Relative errors of gradients from codes of 8 bits.
ERROR = 0.03
EIGHT_BITS = dict(
    base='L3',
    attention=8,
    attention_value=8,
    conv=8,
    norm=8,
    adaptive=False,
)


def make(bits=8, chunk_mib=None):
    layer = QScaledDotProductAttention()
    layer.quantizer = LayerQuantizer(
        bits,
        generator=mmactnn.RoundingGenerator(seed=0),
        attention_bits=AttentionBits(bits, bits),
        chunk_mib=chunk_mib,
    )
    return layer


def make_inputs(*shape, dtype=torch.float32, device='cpu'):
    """Queries, keys and values [N, H, L, D] as views of one tensor."""
    samples, heads, length, channels = shape
    x = torch.randn(samples, length, 3, heads, channels, device=device)
    return x.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def run(function, tensors, *args, **kwargs):
    """Output and gradients of a weighted sum of it."""
    copies = [
        t.detach().as_strided(t.size(), t.stride(), t.storage_offset())
        for t in tensors
    ]
    leaves = [t.requires_grad_() for t in copies]
    output = function(*leaves, *args, **kwargs)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device)
    weights = weights.view(output.shape).to(output.dtype).sin()
    return output.detach(), torch.autograd.grad(output, leaves, weights)


def assert_close_gradients(found, expected, error=ERROR):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert 0 < relative_error(a, b) < error


CALLS = dict(
    plain=dict(),
    causal=dict(is_causal=True),
    scaled=dict(scale=0.5),
    bool_mask=dict(attn_mask=torch.rand(9, 9).fill_diagonal_(1) > 0.4),
    float_mask=dict(attn_mask=torch.linspace(-2, 2, 4 * 81).view(1, 4, 9, 9)),
    for_samples=dict(attn_mask=torch.linspace(-2, 2, 27).view(3, 1, 1, 9)),
)


@in_turn(name=tuple(CALLS))
def test_against_float64(name, device):
    tensors = make_inputs(3, 4, 9, 16, device=device)
    call = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in CALLS[name].items()
    }
    mask = call.get('attn_mask')
    wide = dict(call)
    if mask is not None and mask.is_floating_point():
        wide['attn_mask'] = mask.double()
    attend = F.scaled_dot_product_attention
    output, _ = run(attend, tensors, **call)
    _, expected = run(attend, [t.double() for t in tensors], **wide)
    found, gradients = run(make(), tensors, **call)
    assert_same_bits(found, output)
    assert_close_gradients(gradients, expected)


@in_turn(dtype=(torch.float16, torch.bfloat16))
def test_half_precision(dtype, device):
    tensors = make_inputs(2, 2, 8, 16, dtype=dtype, device=device)
    attend = F.scaled_dot_product_attention
    output, _ = run(attend, tensors)
    _, expected = run(attend, [t.double() for t in tensors])
    found, gradients = run(make(), tensors)
    assert_same_bits(found, output)
    assert all(g.dtype == dtype for g in gradients)
    assert_close_gradients(gradients, expected, 0.05)


SHAPES = dict(
    cross=((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    three_d=((4, 5, 8), (4, 6, 8), (4, 6, 8)),
    one_token=((2, 3, 1, 8), (2, 3, 1, 8), (2, 3, 1, 8)),
    five_d=((2, 2, 3, 5, 8),) * 3,
    odd=((3, 1, 7, 5), (3, 1, 11, 5), (3, 1, 11, 3)),
)


@in_turn(name=tuple(SHAPES))
def test_shapes(name):
    tensors = [torch.randn(shape) for shape in SHAPES[name]]
    output, expected = run(F.scaled_dot_product_attention, tensors)
    found, gradients = run(make(), tensors)
    assert_same_bits(found, output)
    for a, b in zip(gradients, expected, strict=True):
        # A softmax of one key has no gradient.
        assert (a - b).norm() < ERROR * b.norm() + 1e-6


def test_grouped_queries():
    query, other = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 2, 5, 8)
    tensors = query, *other.unbind(0)
    options = dict(enable_gqa=True)
    attend = F.scaled_dot_product_attention
    output, expected = run(attend, tensors, **options)
    found, gradients = run(make(), tensors, **options)
    assert_same_bits(found, output)
    assert_close_gradients(gradients, expected)


def test_empty():
    tensors = make_inputs(0, 2, 3, 8)
    found, gradients = run(make(), tensors)
    assert found.shape == (0, 2, 3, 8)
    assert all(g.shape == (0, 2, 3, 8) for g in gradients)


@in_turn(chunk_mib=(None, 1e-3))
def test_gradient_of_bias(chunk_mib, device):
    """An expanded bias is kept, and its gradient summed, as small as it is."""
    tensors = make_inputs(6, 2, 7, 16, device=device)
    bias = torch.randn(2, 7, 7, device=device)

    def attend(function):
        def call(query, key, value, bias):
            mask = bias.unsqueeze(0).expand(6, -1, -1, -1)
            return function(query, key, value, mask)

        return call

    used = *tensors, bias
    output, expected = run(attend(F.scaled_dot_product_attention), used)
    found, gradients = run(attend(make(chunk_mib=chunk_mib)), used)
    assert_same_bits(found, output)
    assert_close_gradients(gradients, expected)
    layer = attend(make())
    bias.requires_grad_()
    with saved_tensors() as saved:
        layer(*(t.detach().requires_grad_() for t in tensors), bias)
    assert sum(t.untyped_storage().nbytes() for t in saved) < 7000


class TestKeptMasks:
    """Large masks are bits, once for all layers that read one mask."""

    SHAPE = 2, 4, 130, 16

    def keep(self, mask, layers=1, hides=True):
        """Bytes kept beside those without a mask, and gradients."""
        quantizer = make().quantizer
        quantizer.cache = PayloadCache()
        tensors = [t.requires_grad_() for t in make_inputs(*self.SHAPE)]
        sizes, results = [], []
        for term in (None, mask):
            with saved_tensors() as saved:
                output = sum(
                    attention(
                        *tensors,
                        quantizer,
                        # A view of its own, as layers make it.
                        () if term is None else (term.view(term.shape),),
                        hides=hides,
                    )
                    for _ in range(layers)
                )
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in saved
            }
            sizes.append(sum(storages.values()))
            results.append(output)
        gradients = torch.autograd.grad(
            results[1], tensors, torch.ones_like(results[1])
        )
        return sizes[1] - sizes[0], results[1], gradients

    @in_turn(layers=(1, 3), hides=(True, False))
    def test_bits(self, layers, hides):
        torch.manual_seed(0)
        mask = torch.rand(2, 4, 130, 130) > 0.5
        mask[..., 0] = not hides
        kept, *found = self.keep(mask, layers, hides)
        assert kept == mask.numel() // 8
        torch.manual_seed(0)
        summand = torch.zeros_like(mask, dtype=torch.float32)
        summand[mask if hides else ~mask] = -math.inf
        torch.rand(2, 4, 130, 130)
        # Of the same random bits for the same queries, keys and values.
        _, *expected = self.keep(summand, layers, hides)
        torch.testing.assert_close(found, expected)

    def test_small_and_expanded_ones_are_kept_as_they_are(self):
        torch.manual_seed(0)
        small = torch.zeros(2, 1, 1, 130, dtype=torch.bool)
        assert self.keep(small)[0] == small.numel()
        row = torch.zeros(130, 130, dtype=torch.bool)
        assert self.keep(row.expand(2, 4, -1, -1))[0] == row.numel()

    def test_a_mask_that_is_written_to_is_packed_again(self):
        """Each layer has the mask that it was called with."""
        torch.manual_seed(0)
        tensors = [t.requires_grad_() for t in make_inputs(*self.SHAPE)]
        masks = torch.rand(2, 2, 4, 130, 130) > 0.5
        masks[..., 0] = False
        quantizer = make().quantizer
        mask = masks[0].clone()
        total = attention(*tensors, quantizer, (mask,), hides=True)
        mask.copy_(masks[1])
        total = total + attention(*tensors, quantizer, (mask,), hides=True)
        found = torch.autograd.grad(total.sin().sum(), tensors)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        total = sum(F.scaled_dot_product_attention(*wide, ~m) for m in masks)
        expected = torch.autograd.grad(total.sin().sum(), wide)
        assert_close_gradients(found, expected)


def test_pieces_give_the_gradients_of_the_whole():
    tensors = make_inputs(7, 2, 9, 16)
    _, whole = run(make(), tensors)
    _, pieces = run(make(chunk_mib=0.01), tensors)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)


def test_periodic_biases():
    """Biases of windows repeat over images."""
    tensors = make_inputs(6, 2, 5, 16)
    bias, mask = torch.randn(1, 2, 5, 5), torch.randn(3, 1, 5, 5)

    def expanded(query, key, value, bias):
        whole = (bias + mask).repeat(2, 1, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, whole)

    def periodic(chunk_mib):
        quantizer = make(chunk_mib=chunk_mib).quantizer
        return lambda q, k, v, bias: attention(
            q, k, v, quantizer, (bias, mask), period=3
        )

    output, expected = run(expanded, (*tensors, bias))
    for chunk_mib in (None, 1e-3):
        found, gradients = run(periodic(chunk_mib), (*tensors, bias))
        torch.testing.assert_close(found, output)
        assert_close_gradients(gradients, expected)


class TestDropout:
    def test_backward_drops_the_same(self, device):
        """With values of zeros but one, outputs tell which weights are 0."""
        query, key = torch.zeros(2, 2, 2, 8, 8, device=device).unbind(0)
        value = torch.eye(8, device=device).expand(2, 2, 8, 8).contiguous()
        value = value.requires_grad_()
        layer = make()
        torch.manual_seed(3)
        output = layer(query, key, value, None, 0.5)
        assert 0 < (output == 0).float().mean() < 1
        # Other calls in between, which draw.
        torch.rand(3), torch.rand(3, device=device)
        state = torch.get_rng_state()
        grad = torch.zeros_like(output)
        grad[..., 3, :] = 1
        (found,) = torch.autograd.grad(output, value, grad)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(found[..., 0], output[..., 3, :])

    def test_forward_is_torch_s(self):
        tensors = make_inputs(3, 2, 9, 16)
        torch.manual_seed(5)
        expected = F.scaled_dot_product_attention(*tensors, dropout_p=0.3)
        tensors = [t.requires_grad_() for t in tensors]
        torch.manual_seed(5)
        assert_same_bits(make()(*tensors, dropout_p=0.3), expected)

    def test_one_mask_although_there_are_pieces(self):
        tensors = make_inputs(6, 2, 9, 16)
        runs = []
        for chunk_mib in (None, 1e-3):
            torch.manual_seed(5)
            layer = make(chunk_mib=chunk_mib)
            runs.append(run(layer, tensors, dropout_p=0.3))
        (output, expected), (found, gradients) = runs
        assert_same_bits(found, output)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_in_checkpointed_block(self):
        tensors = make_inputs(3, 2, 9, 16)
        layer = make()

        def block(*tensors):
            return layer(*tensors, None, 0.3)

        def checkpointed(*tensors):
            return checkpoint(block, *tensors, use_reentrant=False)

        torch.manual_seed(5)
        _, expected = run(F.scaled_dot_product_attention, tensors, None, 0.3)
        torch.manual_seed(5)
        _, gradients = run(checkpointed, tensors)
        assert_close_gradients(gradients, expected)


@in_turn(bits=(3, 4))
def test_unbiased(bits):
    """The mean of draws tends to the gradient.

    Queries and keys enter through a softmax. The bias is below a tenth of
    the error of one draw at 4 bits, and below 0.15 at 3. (The expectation of
    what the noise of the draws adds to its square is subtracted.)
    """
    torch.manual_seed(0)
    tensors = make_inputs(3, 2, 20, 16)
    _, expected = run(F.scaled_dot_product_attention, tensors)
    layer = make(bits)
    draws = [run(layer, tensors)[1] for _ in range(100)]
    for i, gradient in enumerate(expected):
        errors = torch.stack([draw[i] - gradient for draw in draws])
        error = errors.square().sum((1, 2, 3, 4)).mean()
        bias = errors.mean(0).square().sum() - error / len(draws)
        assert error > 0
        limit = 0.1 if bits == 4 else 0.15
        assert bias.clamp(min=0).sqrt() < limit * error.sqrt(), i


def test_means_of_channels_are_kept():
    """Queries and keys far from zero have no larger error."""
    query, key, value = make_inputs(4, 2, 24, 16)
    offset = 30 * torch.randn(1, 2, 1, 16)
    shifted = query, key + offset, value

    def error(tensors):
        _, expected = run(F.scaled_dot_product_attention, tensors)
        _, gradients = run(make(4), tensors)
        return relative_error(gradients[2], expected[2])

    assert error(shifted) < 1.5 * error((query, key, value))


def test_kept_bytes():
    """4, 4 and 3 bits, ranges, means; nothing of the size of the scores."""
    samples, heads, length, channels = 8, 4, 64, 32
    numel = samples * heads * length * channels
    layer = make()
    layer.quantizer.attention_bits = AttentionBits(4, 3)
    tensors = make_inputs(samples, heads, length, channels)
    tensors = [t.requires_grad_() for t in tensors]
    with measure_activations(layer) as meter:
        output = layer(*tensors)
    codes = numel * (4 + 4 + 3) // 8
    ranges = 3 * numel // 256 * 4
    means = 2 * heads * channels * 4
    assert meter.saved_bytes == codes + ranges + means
    inputs = 3 * numel * 4
    logsumexp = samples * heads * length * 4
    assert meter.exact_bytes == inputs + output.nbytes + logsumexp


def test_two_payloads_of_one_projection(monkeypatch):
    packed = []
    pack = LayerQuantizer.pack

    def counting(self, tensor):
        packed.append((self.bits, tensor.shape))
        return pack(self, tensor)

    monkeypatch.setattr(LayerQuantizer, 'pack', counting)
    tensors = make_inputs(2, 2, 4, 8)
    layer = make()
    run(layer, tensors)
    assert packed == [(8, (2, 4, 3 * 16))]
    packed.clear()
    layer.quantizer.attention_bits = AttentionBits(4, 3)
    run(layer, tensors)
    assert packed == [(4, (2, 4, 2 * 16)), (3, (2, 4, 16))]


def test_second_derivatives_are_refused():
    tensors = [t.requires_grad_() for t in make_inputs(2, 2, 4, 8)]
    output = make()(*tensors)
    (grad,) = torch.autograd.grad(
        output.square().sum(), tensors[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match='Attention cannot be differ'):
        grad.sum().backward()


def test_output_may_be_overwritten():
    tensors = [t.requires_grad_() for t in make_inputs(2, 2, 4, 8)]
    output = make()(*tensors)
    output.mul_(2).sum().backward()
    assert torch.isfinite(tensors[0].grad).all()


@in_turn(case=('eval', 'no grad', 'L0', 'float64'))
def test_exact(case):
    layer = make()
    tensors = make_inputs(2, 2, 4, 8)
    if case == 'eval':
        layer.eval()
    if case == 'L0':
        convert_model(layer, 'L0')
    if case == 'float64':
        tensors = [t.double() for t in tensors]
    output, expected = run(ScaledDotProductAttention(), tensors)
    if case == 'no grad':
        assert_same_bits(layer(*tensors), output)
        return
    found, gradients = run(layer, tensors)
    assert_same_bits(found, output)
    for a, b in zip(gradients, expected, strict=True):
        assert_same_bits(a, b)


def test_functions_of_modules():
    """``F.scaled_dot_product_attention`` in a module that nobody named."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x.transpose(1, 2).flatten(2)

    block = Block().train()
    twin = copy.deepcopy(block)
    convert_model(twin, EIGHT_BITS)
    x = torch.randn(3, 7, 16)
    output, expected = run(block, (x,))
    found, gradients = run(twin, (x,))
    assert_same_bits(found, output)
    assert_close_gradients(gradients, expected)
    x.requires_grad_()
    with measure_activations(twin) as meter:
        twin(x)
    assert meter.saved_bytes < meter.exact_bytes / 3
    convert_model(twin, dict(EIGHT_BITS, rules={'qkv': 8}, attention=None))
    with measure_activations(twin) as meter:
        twin(x)
    assert meter.saved_bytes > meter.exact_bytes / 2


def multihead(options, level=EIGHT_BITS):
    """``nn.MultiheadAttention``, and a converted copy of it."""
    layer = nn.MultiheadAttention(16, 4, **options).train()
    twin = copy.deepcopy(layer)
    convert_model(twin, level)
    assert type(twin) is QMultiheadAttention
    return layer, twin


OPTIONS = dict(
    plain=dict(),
    batch_first=dict(batch_first=True, bias=False),
    other_sizes=dict(kdim=12, vdim=20),
    extended=dict(add_bias_kv=True, add_zero_attn=True),
    dropout=dict(dropout=0.3),
)
MASKS = dict(
    none=dict(),
    padding=dict(key_padding_mask=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])),
    padding_of_floats=dict(key_padding_mask=torch.randn(2, 4)),
    mask=dict(attn_mask=torch.ones(5, 4).triu(1)),
    mask_of_floats=dict(attn_mask=torch.randn(8, 5, 4)),
    both=dict(
        key_padding_mask=torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]),
        attn_mask=torch.ones(5, 4).triu(2),
    ),
)


CASES = [
    *((options, 'both') for options in OPTIONS),
    *(('plain', masks) for masks in MASKS),
]


class TestMultihead:
    @in_turn(case=CASES, weights=(True, False))
    def test_against_torch(self, case, weights):
        options, masks = OPTIONS[case[0]], dict(MASKS[case[1]])
        for name, mask in masks.items():
            if not name.startswith('float') and mask.unique().numel() == 2:
                masks[name] = mask.bool()
        shapes = [
            (5, 2, 16),
            (4, 2, options.get('kdim', 16)),
            (4, 2, options.get('vdim', 16)),
        ]
        inputs = [torch.randn(shape) for shape in shapes]
        if options.get('batch_first'):
            inputs = [x.transpose(0, 1).contiguous() for x in inputs]
        results = []
        for layer in multihead(options):
            leaves = [x.clone().requires_grad_() for x in inputs]
            torch.manual_seed(5)
            output, found = layer(*leaves, need_weights=weights, **masks)
            loss = output.flatten().dot(torch.linspace(-1, 1, output.numel()))
            if weights:
                loss = loss + found.square().sum()
            used = [*leaves, *layer.parameters()]
            results.append((output, found, torch.autograd.grad(loss, used)))
        (output, expected, exact), (found, weights, gradients) = results
        torch.testing.assert_close(found, output)
        torch.testing.assert_close(weights, expected)
        for a, b in zip(gradients, exact, strict=True):
            assert (a - b).norm() < 0.05 * b.norm() + 1e-3

    @in_turn(same=('q', 'qk', 'kv', 'qkv', ''))
    def test_inputs_that_are_one_tensor(self, same):
        layer, twin = multihead({})
        inputs = list(torch.randn(3, 5, 2, 16).unbind(0))
        for first, name in enumerate('qkv'):
            if name in same:
                inputs[first] = inputs['qkv'.index(same[0])]
        output = layer(*inputs)
        inputs = [x.requires_grad_() for x in inputs]
        found = twin(*inputs)
        for a, b in zip(found, output, strict=True):
            torch.testing.assert_close(a, b)

    def test_one_payload_of_one_input(self):
        _, twin = multihead({})
        x = torch.randn(5, 2, 16, requires_grad=True)
        y = torch.randn(5, 2, 16, requires_grad=True)

        def kept(*inputs):
            with measure_activations(twin) as meter:
                twin(*inputs, need_weights=False)
            return meter.saved_bytes

        assert kept(x, x, x) < kept(x, x, y) < kept(x, y, x * 2)
        # Transposes of one tensor are one input, too.
        z = torch.randn(2, 5, 16, requires_grad=True) * 1
        views = [z.transpose(0, 1) for _ in range(3)]
        assert kept(*views) < kept(x, x, y)

    def test_transposed_input_has_its_gradient(self):
        layer, twin = multihead({})
        gradients = []
        for part in (layer, twin):
            torch.manual_seed(3)
            z = torch.randn(2, 5, 16, requires_grad=True)
            views = [(z * 2).transpose(0, 1) for _ in range(3)]
            output, _ = part(*views)
            output[0].sum().backward()
            gradients.append(z.grad)
        assert relative_error(*reversed(gradients)) < ERROR

    def test_no_weights_are_kept(self):
        """Heads times length squared would be many times the inputs."""
        layer, twin = multihead({})
        x = torch.randn(64, 2, 16, requires_grad=True)
        with measure_activations(twin) as meter:
            twin(x, x, x)
        assert meter.saved_bytes < 20_000
        weights = 2 * 4 * 64 * 64 * 4
        assert meter.exact_bytes > weights > 100_000

    def test_weights_that_a_module_drops(self):
        class Drops(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = nn.MultiheadAttention(16, 4)

            def forward(self, x):
                return self.attn(x, x, x)[0]

        class Reads(Drops):
            def forward(self, x):
                output, weights = self.attn(x, x, x)
                return output + weights.sum()

        x = torch.randn(5, 2, 16, requires_grad=True)
        for cls, drops in ((Drops, True), (Reads, False)):
            model = cls().train()
            exact = model(x)
            convert_model(model, EIGHT_BITS)
            kinds = []
            compress = QMultiheadAttention._compress

            def record(self, *args, kinds=kinds, compress=compress):
                kinds.append(args[4])
                return compress(self, *args)

            QMultiheadAttention._compress = record
            try:
                torch.testing.assert_close(model(x), exact)
                _, weights = model.attn(x, x, x)
            finally:
                QMultiheadAttention._compress = compress
            assert kinds == [None if drops else True, True]
            assert weights.shape == (2, 5, 5)

    def test_unbatched(self):
        layer, twin = multihead({})
        x = torch.randn(5, 16)
        expected = layer(x, x, x)
        x.requires_grad_()
        for a, b in zip(twin(x, x, x), expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b)

    @in_turn(
        call=(
            dict(key_padding_mask=torch.zeros(2, 9).bool()),
            dict(attn_mask=torch.zeros(3, 3)),
            dict(attn_mask=torch.zeros(5, 5, dtype=torch.int64)),
            dict(is_causal=True),
        )
    )
    def test_errors_are_torch_s(self, call):
        layer, twin = multihead({})
        x = torch.randn(5, 2, 16, requires_grad=True)
        with pytest.raises((RuntimeError, AssertionError)) as expected:
            layer(x, x, x, **call)
        with pytest.raises(expected.type) as found:
            twin(x, x, x, **call)
        assert str(found.value) == str(expected.value)

    def test_eval_and_exact_levels(self):
        layer, twin = multihead(dict(dropout=0.5, batch_first=True))
        x = torch.randn(2, 5, 16, requires_grad=True)
        for a, b in zip(twin.eval()(x, x, x), layer.eval()(x, x, x)):
            assert_same_bits(a, b)
        convert_model(twin.train(), 'L0')
        layer.train()
        torch.manual_seed(1)
        expected = layer(x, x, x)
        torch.manual_seed(1)
        for a, b in zip(twin(x, x, x), expected, strict=True):
            assert_same_bits(a, b)
        mmactnn.revert_model(twin)
        assert type(twin) is nn.MultiheadAttention

    def test_rule_by_name(self):
        model = nn.ModuleDict(dict(a=nn.MultiheadAttention(16, 4)))
        convert_model(model, dict(base='L3', rules={'a': 5}))
        quantizer = model['a'].quantizer
        assert quantizer.attention_bits == (5, 5)
        assert quantizer.linear_bits == 5
        twin = pickle.loads(pickle.dumps(model))['a'].quantizer
        assert twin.attention_bits == (5, 5) and twin.linear_bits == 5
        convert_model(model, dict(base='L3', rules={'a': None}))
        assert model['a'].quantizer.exact

    def test_in_encoder_layer(self):
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0).train()
        twin = copy.deepcopy(layer)
        convert_model(twin, EIGHT_BITS)
        x = torch.randn(5, 2, 16)
        output, expected = run(layer, (x,))
        found, gradients = run(twin, (x,))
        torch.testing.assert_close(found, output)
        assert relative_error(gradients[0], expected[0]) < ERROR

    def test_autocast(self, device):
        layer, twin = multihead({})
        x = torch.randn(5, 2, 16, device=device)
        layer, twin = layer.to(device), twin.to(device)
        outputs = []
        for part in (layer, twin):

            def call(x, part=part):
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    return part(x, x, x)[0]

            outputs.append(run(call, (x,)))
        (output, expected), (found, gradients) = outputs
        assert found.dtype == output.dtype == torch.bfloat16
        assert relative_error(found, output) < 0.01
        assert relative_error(gradients[0], expected[0]) < 0.05


def test_parts_are_multiples_of_the_period():
    from mmactnn.autograd.attention import Biases, _parts

    tensors = make_inputs(12, 2, 5, 16)
    needs = (True, True, True, True)
    parts = _parts(tensors, (), needs, Biases(1, True, 3), 4000)
    assert len(parts) > 1
    assert parts[0].start == 0 and parts[-1].stop == 12
    for first, second in zip(parts, parts[1:]):
        assert first.stop == second.start and first.stop % 3 == 0
    assert _parts(tensors, (), needs, Biases(), math.inf) == [WHOLE]
