"""Checkpointing from codes, against torch's and against no checkpointing."""

import contextlib
import functools

import pytest
import torch
from support.transformer import Block, relative
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import mmactnn
from mmactnn import measure_activations

CODED = (8, 64, 64)


class Chain(nn.Module):
    """Blocks, each of them run by a function such as ``checkpoint``."""

    def __init__(self, run, depth=2, **options):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(depth))
        self.run = run

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.run(block, x)
        return x


def plainly(function, *args, **kwargs):
    return function(*args, **kwargs)


def gradients(model, x, seed=0):
    """Output and all gradients as one vector."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(x)
    (
        output * torch.linspace(-1, 1, output.numel()).view_as(output)
    ).sum().backward()
    return output.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters()]
    )


def batch():
    return torch.randn(CODED, generator=torch.Generator().manual_seed(1))


def graph_input(*size, seed=2):
    """A tensor that an operation made, and the leaf that it depends on."""
    leaf = torch.randn(
        size, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    return leaf, leaf * 1


class TestGradients:
    def test_close_to_exact(self):
        x = batch()
        output, exact = gradients(Chain(plainly), x)
        coded_output, coded = gradients(Chain(mmactnn.checkpoint), x)
        assert torch.equal(coded_output, output)
        assert 0 < relative(coded, exact) < 0.02

    def test_unbiased(self):
        x = batch()
        _, exact = gradients(Chain(plainly), x)
        model = Chain(mmactnn.checkpoint)
        draws = [gradients(model, x)[1] for _ in range(32)]
        error = sum(relative(d, exact) for d in draws) / 32
        rest = relative(torch.stack(draws).mean(0), exact)
        # 1 / sqrt(32) of the error is 0.18 of it.
        assert rest < 0.3 * error

    def test_bits_and_group_size(self):
        """Noise is proportional to steps, and these to ranges of groups."""
        errors = []
        for bits, size in ((8, 64), (8, 512), (5, 512)):
            leaf, x = graph_input(64, 2048)
            y = mmactnn.checkpoint(torch.sin, x, bits=bits, group_size=size)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
            errors.append(relative(grad, leaf.detach().cos()))
        assert errors[0] < 0.95 * errors[1] < errors[2] / 6

    def test_small_tokens_among_large_ones(self):
        """Each token has a range of its own: a layer norm scales it up."""
        _, x = graph_input(8, 16, 64)
        x = (x * torch.logspace(-4, 0, 16)[:, None]).detach().requires_grad_()
        norm = nn.LayerNorm(64)

        def gradient(run):
            norm.zero_grad()
            run(norm, x * 1).sin().sum().backward()
            return norm.weight.grad.clone()

        error = relative(gradient(mmactnn.checkpoint), gradient(plainly))
        assert error < 0.02

    def test_exact_without_codable_inputs(self):
        """Leaves stay exact, and so do all gradients."""
        x = batch()
        model = Block()
        _, exact = gradients(model, x)
        for leaf in (x, x.clone().requires_grad_()):
            output = mmactnn.checkpoint(model, leaf)
            model.zero_grad()
            (
                output * torch.linspace(-1, 1, output.numel()).view_as(output)
            ).sum().backward()
            coded = torch.cat([p.grad.flatten() for p in model.parameters()])
            assert torch.equal(coded, exact)

    def test_retain_graph(self):
        model = Chain(mmactnn.checkpoint)
        output = model(batch()).sum()
        parameters = list(model.parameters())
        first = torch.autograd.grad(output, parameters, retain_graph=True)
        second = torch.autograd.grad(output, parameters)
        assert all(map(torch.equal, first, second))

    def test_partial_backward(self):
        leaf, x = graph_input(16, 128)
        a, b = mmactnn.checkpoint(lambda x: (x.exp(), x.sin()), x)
        (grad,) = torch.autograd.grad(b.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(grad, leaf.cos(), atol=0.05, rtol=0)
        (grad,) = torch.autograd.grad(a.sum(), leaf)
        torch.testing.assert_close(grad, leaf.exp(), atol=0.5, rtol=0.05)

    def test_second_derivative(self):
        leaf, x = graph_input(16, 128)
        y = mmactnn.checkpoint(lambda x: x.sin() ** 2, x)
        (grad,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), leaf)
        torch.testing.assert_close(
            second, 2 * (2 * leaf).cos(), atol=0.15, rtol=0
        )

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        leaf, x = graph_input(16, 128)
        seen = []

        def function(x):
            seen.append((x.dtype, x.shape, x.requires_grad, x.is_leaf))
            return x.sin()

        y = mmactnn.checkpoint(function, x.to(dtype))
        (grad,) = torch.autograd.grad(y.float().sum(), leaf)
        assert seen[0] == seen[1] == (dtype, x.shape, True, False)
        torch.testing.assert_close(grad, leaf.cos(), atol=0.06, rtol=0)

    def test_float64_exact(self):
        leaf, x = graph_input(16, 128)
        y = mmactnn.checkpoint(torch.sin, x.double())
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert torch.equal(grad, leaf.double().cos().float())

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_values_that_are_not_finite(self, value):
        leaf, x = graph_input(16, 256)
        x = torch.where(torch.arange(16)[:, None] == 3, value, x)
        y = mmactnn.checkpoint(torch.sin, x)
        (grad,) = torch.autograd.grad((y * 1).nansum(), x)
        assert grad[3].isnan().all()
        torch.testing.assert_close(grad[4:], x[4:].cos(), atol=0.05, rtol=0)

    @pytest.mark.parametrize(
        'change',
        [
            lambda x: x[:, ::2],
            lambda x: x.view(4, 8, 16, -1).to(
                memory_format=torch.channels_last
            ),
        ],
    )
    def test_layouts(self, change):
        leaf, x = graph_input(32, 128)
        order = []

        def function(x):
            order.append(sorted(range(x.dim()), key=x.stride))
            return x.sin()

        y = mmactnn.checkpoint(function, change(x))
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        expected = torch.autograd.grad(change(leaf * 1).sin().sum(), leaf)[0]
        torch.testing.assert_close(grad, expected, atol=0.05, rtol=0)
        assert order[0] == order[1]

    def test_empty(self):
        _, x = graph_input(0, 128)
        mmactnn.checkpoint(torch.sin, x).sum().backward()


class TestArguments:
    def test_nested(self):
        leaf, x = graph_input(16, 128)
        index = torch.arange(16)

        def function(pair, *, options, index, flag):
            assert flag == 'x' and index.dtype == torch.int64
            return {'y': (pair[0] * options['scale'])[index], 'z': pair[1]}

        scale = torch.tensor(2.0, requires_grad=True)
        result = mmactnn.checkpoint(
            function, (x, 3), options=dict(scale=scale), index=index, flag='x'
        )
        assert result['z'] == 3
        result['y'].sin().sum().backward()
        torch.testing.assert_close(
            leaf.grad, 2 * (2 * leaf).cos(), atol=1e-5, rtol=1e-5
        )
        expected = ((2 * leaf).cos() * leaf).sum()
        torch.testing.assert_close(scale.grad, expected, atol=0.5, rtol=0.01)

    def test_one_tensor_twice(self):
        _, x = graph_input(16, 128)
        same = []

        def function(a, b):
            same.append(a is b)
            return a * b

        mmactnn.checkpoint(function, x, x).sum().backward()
        assert same == [True, True]

    def test_small_beside_large_stays_exact(self):
        _, x = graph_input(64, 1024)
        _, points = graph_input(64, 32)
        seen = []

        def function(x, points):
            seen.append((x.detach(), points.detach()))
            return x.sin() * points.cos().sum()

        mmactnn.checkpoint(function, x, points).sum().backward()
        assert torch.equal(seen[0][1], seen[1][1])
        assert not torch.equal(seen[0][0], seen[1][0])

    def test_originals_are_freed(self):
        leaf, x = graph_input(64, 1024)
        reference = x.untyped_storage()._weak_ref()
        y = mmactnn.checkpoint(torch.sin, x)
        del x
        expired = torch.UntypedStorage._expired(reference)
        torch.UntypedStorage._free_weak_ref(reference)
        assert expired
        y.sum().backward()
        torch.testing.assert_close(leaf.grad, leaf.cos(), atol=0.05, rtol=0)

    def test_shared_payload(self):
        leaf, x = graph_input(64, 1024)
        model = nn.Identity()
        with measure_activations(model) as meter:
            a = mmactnn.checkpoint(torch.sin, x)
            once = meter.saved_bytes
            b = mmactnn.checkpoint(torch.cos, x)
            twice = meter.saved_bytes
        assert twice - once < 100
        (a.sum() + b.sum()).backward()
        torch.testing.assert_close(
            leaf.grad, leaf.cos() - leaf.sin(), atol=0.1, rtol=0
        )


class TestSideEffects:
    def test_input_written_to(self):
        leaf, x = graph_input(16, 128)
        y = mmactnn.checkpoint(lambda x: x.mul_(2).sin(), x)
        y.sum().backward()
        torch.testing.assert_close(
            leaf.grad, 2 * (2 * leaf).cos(), atol=0.1, rtol=0
        )

    def test_input_written_to_later(self):
        leaf, x = graph_input(16, 128)
        y = mmactnn.checkpoint(torch.sin, x)
        with torch.no_grad():
            x.zero_()
        y.sum().backward()
        torch.testing.assert_close(leaf.grad, leaf.cos(), atol=0.05, rtol=0)

    def test_exact_input_written_to_later(self):
        x = torch.randn(16, 128)
        weight = torch.ones(128, requires_grad=True)
        y = mmactnn.checkpoint(lambda x, w: (x * w).sin(), x, weight)
        x.zero_()
        with pytest.raises(RuntimeError, match='modified by an inplace'):
            y.sum().backward()

    def test_arguments_that_share_memory(self):
        """As torch's: a write to one that shows in the other is an error."""
        for checkpoint in (torch_checkpoint, mmactnn.checkpoint):
            _, x = graph_input(16, 128)
            y = checkpoint(
                lambda a, b: a.mul_(2) * b,
                x,
                x[1:].view(15, 128)[:1],
                use_reentrant=False,
            )
            with pytest.raises(RuntimeError, match='modified by an inplace'):
                y.sum().backward()

    def test_output_is_input(self):
        leaf, x = graph_input(16, 128)
        a, b, c = mmactnn.checkpoint(lambda x: (x, x.view(-1), x.sin()), x)
        assert a is x and b.data_ptr() == x.data_ptr()
        (a.sum() + b.sum() + c.sum()).backward()
        torch.testing.assert_close(
            leaf.grad, 2 + leaf.cos(), atol=0.05, rtol=0
        )

    def test_error_in_function(self):
        _, x = graph_input(16, 128)

        def function(x):
            raise KeyError('mine')

        with pytest.raises(KeyError, match='mine'):
            mmactnn.checkpoint(function, x)

    def test_other_shapes_again(self):
        _, x = graph_input(16, 128)
        calls = []

        def function(x):
            calls.append(None)
            return x[len(calls) :].sin().exp()

        y = mmactnn.checkpoint(function, x)
        with pytest.raises(RuntimeError, match='different metadata'):
            y.sum().backward()


class TestState:
    def test_dropout(self):
        x = batch()
        _, exact = gradients(Chain(plainly, dropout=0.3), x, seed=5)
        _, coded = gradients(Chain(mmactnn.checkpoint, dropout=0.3), x, seed=5)
        assert relative(coded, exact) < 0.02

    def test_dropout_without_state(self):
        run = functools.partial(mmactnn.checkpoint, preserve_rng_state=False)
        x = batch()
        _, exact = gradients(Chain(plainly, dropout=0.3), x, seed=5)
        _, coded = gradients(Chain(run, dropout=0.3), x, seed=5)
        assert relative(coded, exact) > 0.1

    def test_generator_of_torch_untouched(self):
        x = batch()
        gradients(Chain(plainly, dropout=0.3), x, seed=5)
        expected = torch.get_rng_state()
        gradients(Chain(mmactnn.checkpoint, dropout=0.3), x, seed=5)
        assert torch.equal(torch.get_rng_state(), expected)

    def test_autocast(self):
        x = batch()
        results = []
        for run in (plainly, mmactnn.checkpoint):
            model = Chain(run)
            with torch.autocast('cpu', torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            results.append(
                torch.cat([p.grad.flatten() for p in model.parameters()])
            )
        assert relative(results[1], results[0]) < 0.02

    @pytest.mark.parametrize('norm', ['batch', 'compressed'])
    def test_running_statistics_updated_once(self, norm):
        nets, x = [], torch.randn(8, 4, 16, 16)
        for run in (plainly, mmactnn.checkpoint):
            torch.manual_seed(0)
            cls = nn.BatchNorm2d if norm == 'batch' else mmactnn.QBatchNorm2d
            net = nn.Sequential(
                nn.Conv2d(4, 8, 3, bias=False),
                cls(8),
                nn.SiLU(),
                nn.Conv2d(8, 8, 3),
            )
            stem = nn.Conv2d(4, 4, 1)
            run(net, stem(x)).square().sum().backward()
            nets.append(net)
        exact, coded = (net.state_dict() for net in nets)
        for key in exact:
            assert torch.equal(coded[key], exact[key]), key
        assert int(nets[1][1].num_batches_tracked) == 1
        # The compressed layer rounds for itself, to two bits.
        limit = 0.02 if norm == 'batch' else 0.5
        for a, b in zip(nets[0].parameters(), nets[1].parameters()):
            assert relative(b.grad, a.grad) < limit

    def test_statistics_of_a_closure(self):
        norm = nn.BatchNorm1d(128)

        def make():
            def inner(x):
                return norm(x).sin()

            return lambda x: inner(x)

        _, x = graph_input(16, 128)
        mmactnn.checkpoint(make(), x).sum().backward()
        assert int(norm.num_batches_tracked) == 1


class TestTorchsKeywords:
    def test_reentrant_refused(self):
        for value in (True, None):
            with pytest.raises(ValueError, match='use_reentrant must be Fa'):
                mmactnn.checkpoint(torch.sin, batch(), use_reentrant=value)

    @pytest.mark.parametrize('bits', [0, 9, None])
    def test_bits(self, bits):
        with pytest.raises(ValueError, match='bits'):
            mmactnn.checkpoint(torch.sin, batch(), bits=bits)

    @pytest.mark.parametrize('p, runs', [(0.0, 1), (0.5, 2)])
    def test_dropout_of_nothing_keeps_no_mask(self, p, runs):
        """Operations before a mask have to be computed again."""
        layer, dropout, calls = nn.Linear(64, 64), nn.Dropout(p), []
        layer.register_forward_hook(lambda *_: calls.append(1))
        leaf, x = graph_input(4, 16, 64)
        output = mmactnn.checkpoint(lambda x: dropout(layer(x.sin())), x)
        if not p:
            assert torch.equal(output, layer(x.sin()))
            calls.clear(), calls.append(1)
        output.sum().backward()
        assert len(calls) == runs
        assert leaf.grad.abs().sum() > 0

    @pytest.mark.parametrize('early_stop', [True, False])
    def test_early_stop(self, early_stop):
        _, x = graph_input(16, 128)
        ends = []

        def function(x):
            y = x.sin().exp()
            ends.append(None)
            return y + 1

        mmactnn.checkpoint(function, x, early_stop=early_stop).sum().backward()
        assert len(ends) == (1 if early_stop else 2)
        with set_checkpoint_early_stop(not early_stop):
            _, x = graph_input(16, 128)
            ends.clear()
            mmactnn.checkpoint(
                function, x, early_stop=early_stop
            ).sum().backward()
        assert len(ends) == (2 if early_stop else 1)

    def test_determinism_check(self):
        _, x = graph_input(16, 128)
        with pytest.raises(ValueError, match='determinism_check'):
            mmactnn.checkpoint(torch.sin, x, determinism_check='odd')

    def test_debug(self):
        _, x = graph_input(16, 128)
        calls = []

        def function(x):
            calls.append(None)
            return x[len(calls) :].sin().exp()

        y = mmactnn.checkpoint(function, x, debug=True)
        with pytest.raises(RuntimeError, match='aten::sin|aten.sin'):
            y.sum().backward()

    def test_selective(self):
        """Products are kept, and not computed again."""

        def policy(ctx, op, *args, **kwargs):
            if op is torch.ops.aten.mm.default:
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(
            create_selective_checkpoint_contexts, policy
        )
        weight = torch.randn(128, 128, requires_grad=True)
        leaf, x = graph_input(16, 128)
        y = mmactnn.checkpoint(
            lambda x: (x @ weight).sin(), x, context_fn=contexts
        )
        y.sum().backward()
        torch.testing.assert_close(
            leaf.grad, (leaf @ weight).cos() @ weight.T, rtol=1e-4, atol=1e-4
        )

    def test_context_that_hides_errors(self):
        _, x = graph_input(16, 128)
        with pytest.raises(RuntimeError, match='suppressed an exception'):
            mmactnn.checkpoint(
                lambda x: x.no_such_method(),
                x,
                context_fn=lambda: (
                    contextlib.suppress(AttributeError),
                    contextlib.nullcontext(),
                ),
            )

    def test_without_gradients(self):
        x = batch()
        with torch.no_grad():
            assert not mmactnn.checkpoint(Block(), x).requires_grad


class TestNesting:
    @pytest.mark.parametrize('outer', [torch_checkpoint, mmactnn.checkpoint])
    @pytest.mark.parametrize('inner', [torch_checkpoint, mmactnn.checkpoint])
    def test_nested(self, outer, inner):
        x = batch()
        _, exact = gradients(Chain(plainly, depth=1, dropout=0.2), x)

        def run(block, x):
            def function(x):
                # The inner segment has an input that is computed.
                return inner(block, x * 1, use_reentrant=False)

            return outer(function, x, use_reentrant=False)

        _, coded = gradients(Chain(run, depth=1, dropout=0.2), x)
        error = relative(coded, exact)
        if outer is inner is torch_checkpoint:
            assert error < 1e-6
        else:
            assert 1e-5 < error < 0.02

    def test_reentrant_outside(self):
        x = batch().requires_grad_()
        _, exact = gradients(Chain(plainly, depth=1), x)

        def run(block, x):
            return torch_checkpoint(
                lambda x: mmactnn.checkpoint(block, x * 1),
                x,
                use_reentrant=True,
            )

        _, coded = gradients(Chain(run, depth=1), x)
        assert relative(coded, exact) < 0.02

    def test_compressed_layers_inside(self):
        x = batch()
        _, exact = gradients(Chain(plainly), x)
        model = Chain(mmactnn.checkpoint)
        mmactnn.convert_model(model, 'L2', include=[nn.Linear])
        _, coded = gradients(model, x)
        assert relative(coded, exact) < 0.5

    def test_saved_tensors_hooks(self):
        x = batch()
        _, exact = gradients(Chain(plainly), x)
        moved = []

        def pack(tensor):
            moved.append(tensor.nbytes)
            # Other memory, as after a copy to the host and back.
            return tensor.detach().clone()

        def unpack(tensor):
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            _, coded = gradients(Chain(mmactnn.checkpoint), x)
        assert relative(coded, exact) < 0.02
        # Codes of two inputs, the input of the stem, and the loss's factor.
        assert sum(moved) < x.nbytes * (2 + 2 * 0.27)


class TestMeter:
    def test_counts_codes_and_what_torch_keeps(self):
        x = batch()
        exact_model, model = Chain(plainly), Chain(mmactnn.checkpoint)
        with measure_activations(exact_model) as exact:
            exact_model(x).sum()
        with measure_activations(model) as coded:
            model(x).sum().backward()
        assert coded.exact_bytes == exact.exact_bytes
        saved = x.nbytes + 2 * x.nbytes // 4 * (1 + 4 / 64)
        # Random bits of two payloads.
        assert coded.saved_bytes - saved in range(65)
        assert coded.layers_ratio > 15

    def test_torchs_checkpoint_counts_as_before(self):
        x = batch()
        model = Chain(functools.partial(torch_checkpoint, use_reentrant=False))
        with measure_activations(model) as meter:
            model(x).sum()
        assert meter.exact_bytes == meter.saved_bytes == 3 * x.nbytes
