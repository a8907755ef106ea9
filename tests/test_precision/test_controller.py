"""Adaptive precision: bits go where they matter, alike in every run."""

import copy
import io
import itertools
import threading

import pytest
import torch
from support.layers import assert_same_bits
from support.precision_cases import (
    Net,
    batch,
    make_net,
    train,
    train_apart,
    train_distributed,
)
from support.processes import run_in_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import (
    AdaptivePrecision,
    QConv2d,
    RoundingGenerator,
    convert_model,
    get_precision,
    measure_activations,
    ops,
    revert_model,
)
from mmactnn.codes.quantizer import LayerQuantizer
from mmactnn.precision import controller, sensitivity
from mmactnn.precision.variance import (
    relative_variance,
    variance_of_normal_values,
)

SEEN = ('stem', 'norm', 'body', 'fc')


def at_bits(bits):
    """Factor of a variance that is stated at one bit."""
    return relative_variance(bits, ops.DEFAULT_ROUNDING == 'rotated')


def average(net):
    """Mean bits an element of the layers that take part."""
    averages = get_precision(net)._averages
    numel = {name: values[3] for name, values in averages.items()}
    bits = get_precision(net).bits
    return sum(bits[n] * numel[n] for n in numel) / sum(numel.values())


class TestLayers:
    def test_bits_move_within_the_budget(self, device):
        net = make_net().to(device)
        assert set(get_precision(net).bits.values()) == {2}
        train(net, range(2), device)
        assert set(get_precision(net).bits.values()) == {2}
        train(net, range(2, 6), device)
        bits = get_precision(net).bits
        assert len({bits[name] for name in SEEN}) > 1
        assert all(value == int(value) for value in bits.values())
        assert 1.5 < average(net) <= 2

    def test_a_norm_has_the_bits_of_its_convolution(self, device):
        net = make_net(dict(conv=4, norm=4)).to(device)
        train(net, range(6), device)
        bits = get_precision(net).bits
        assert bits['norm'] == bits['stem']

    def test_a_convolution_follows_none_that_it_reads(self):
        class Head(nn.Module):
            def __init__(self):
                super().__init__()
                self.levels = nn.ModuleList(
                    nn.Conv2d(3, 4, 3, stride=2**i) for i in range(3)
                )
                self.head = nn.Conv2d(4, 4, 1)

            def forward(self, x):
                return sum(self.head(conv(x)).mean() for conv in self.levels)

        torch.manual_seed(0)
        net = Head()
        convert_model(net, 'L3', generator=RoundingGenerator(seed=5))
        for step in range(4):
            net(batch(step).requires_grad_()).backward()
        layers = get_precision(net).layers
        assert [layer.leader for layer in layers] == [None] * 4

    def test_layers_without_reports_keep_their_bits(self, device):
        net = make_net().to(device)
        train(net, range(6), device)
        assert set(get_precision(net)._averages) == set(SEEN)
        bits = get_precision(net).bits
        assert bits['unused'] == bits['frozen'] == 2

    def test_a_reused_layer_counts_all_its_inputs(self, device):
        net = make_net().to(device)
        train(net, range(6), device)
        numel = get_precision(net)._averages['body'][3]
        assert numel == 4 * 8 * (16 * 16 + 8 * 8)

    def test_a_mean_that_is_no_whole_number(self, device):
        net = make_net(dict(conv=2.5, norm=3.5)).to(device)
        train(net, range(6), device)
        assert 2 < average(net) < 3.5

    def test_overflow_is_not_learnt_from(self, device):
        net = make_net().to(device)
        net(batch(0, device=device) * float('inf')).sum().backward()
        net.zero_grad()
        train(net, range(2), device)
        assert not get_precision(net)._averages
        train(net, range(4), device)
        assert get_precision(net)._averages

    @pytest.mark.parametrize('period', [2, 3])
    def test_passes_without_gradients_are_made_up_for(self, period, device):
        # As a generator, whose images the other step only looks at.
        net = make_net().to(device)
        for step in range(60):
            loss = net(batch(step, device=device)).square().mean()
            if step % period == 0:
                loss.backward()
        times = [v[-1] for v in get_precision(net)._averages.values()]
        assert min(times) >= 5

    def test_error_falls_at_equal_memory(self, device):
        errors, saved = {}, {}
        fixed, adaptive = 'L2', dict(conv=4, norm=4)
        for name, level in dict(fixed=fixed, adaptive=adaptive).items():
            net = make_net(level).to(device)
            exact = make_net('L0').to(device)
            for _ in range(3):
                net(batch(0, device=device)).square().mean().backward()
            exact(batch(0, device=device)).square().mean().backward()
            wanted = torch.cat(
                [
                    p.grad.flatten()
                    for p in exact.parameters()
                    if p.grad is not None
                ]
            )
            error = 0
            for _ in range(40):
                net.zero_grad()
                with measure_activations(net) as meter:
                    loss = net(batch(0, device=device)).square().mean()
                loss.backward()
                found = torch.cat(
                    [
                        p.grad.flatten()
                        for p in net.parameters()
                        if p.grad is not None
                    ]
                )
                error += float((found - wanted).norm() / wanted.norm()) / 40
            errors[name] = error
            saved[name] = meter.layers_saved_bytes
        assert errors['adaptive'] < 0.75 * errors['fixed']
        assert saved['adaptive'] < 1.05 * saved['fixed']


class TestSensitivity:
    def test_of_a_convolution(self):
        conv = QConv2d(4, 6, 3, padding=1, bits=4)
        conv.quantizer.generator = RoundingGenerator(seed=1)
        x = torch.randn(3, 4, 12, 12)
        grad = torch.randn(3, 6, 12, 12)
        payload = conv.quantizer.pack(x)
        norms = sensitivity.squared_norms(grad)
        torch.testing.assert_close(norms, grad.square().sum((1, 2, 3)))
        predicted = sensitivity.weight_gradient_variance(payload, norms, 36)
        exact = torch.nn.grad.conv2d_weight(x, (6, 4, 3, 3), grad, padding=1)
        errors = []
        for _ in range(100):
            conv.weight.grad = None
            conv(x).backward(grad)
            errors.append((conv.weight.grad - exact).square().sum())
        measured = torch.stack(errors).mean()
        # Padding leaves out some products, values are not quite uniform.
        predicted *= at_bits(4)
        assert 0.7 < measured / predicted < 1.05

    @pytest.mark.parametrize('bits', [1, 2, 3, 8])
    def test_is_stated_at_one_bit(self, bits):
        generator = RoundingGenerator(seed=1)
        x = torch.rand(5, 2048)
        x[:, ::64], x[:, 1::64] = 0, 1
        # With dither, but in groups that begin with 0, it is half of that.
        for rounding, shift, expected in (
            ('stochastic', 0, 1 / 6),
            ('stochastic', 0.5, 1 / 6),
            ('dither', 0, 1 / 6),
            ('dither', 0.5, 1 / 12),
        ):
            quantizer = LayerQuantizer(bits, 256, generator, rounding=rounding)
            payload = quantizer.pack(x - shift)
            variance = sensitivity.variance_at_one_bit(payload)
            torch.testing.assert_close(
                variance, torch.full((5,), expected), rtol=0.02, atol=0
            )

    @pytest.mark.parametrize('bits', [1, 2, 3, 4, 8])
    def test_of_rotated_codes_is_stated_at_one_bit(self, bits):
        """The same for all bits, if values are normally distributed."""
        x = torch.randn(5, 16384) * torch.arange(1, 6)[:, None]
        payload = LayerQuantizer(bits, rounding='rotated').pack(x)
        variance = sensitivity.variance_at_one_bit(payload)
        expected = x.var(1) * variance_of_normal_values(1)
        torch.testing.assert_close(variance, expected, rtol=0.05, atol=0)

    @pytest.mark.parametrize('rounding', ['dither', 'rotated'])
    @pytest.mark.parametrize('kind', ['uniform', 'rows', 'ragged'])
    def test_is_that_of_what_is_decoded(self, kind, rounding):
        """Of values that are not normal, in groups of different scales.

        That of codes alone depends on how values lie between codes.
        """
        generator = RoundingGenerator(seed=1)
        x = torch.rand(6, 24, 16, 16 if kind != 'ragged' else 15).pow(2)
        x = (x - 0.2) * torch.linspace(0.1, 2, 24)[:, None, None]
        for bits in (2.5,) if kind == 'rows' else (1, 2, 3, 4):
            layer_bits = None
            if kind == 'rows':
                layer_bits = AdaptivePrecision().add('layer', bits)
                layer_bits.called = True
            quantizer = LayerQuantizer(
                bits, 256, generator, None, layer_bits, rounding=rounding
            )
            squares, draws = 0, 32
            for _ in range(draws):
                payload = quantizer.pack(x)
                error = (payload.unpack() - x).double().flatten(1)
                squares = squares + error.square().mean(1) / draws
            assert (payload.row_bits is not None) == (kind == 'rows')
            found = sensitivity.variance_at_one_bit(payload)
            scale = relative_variance(bits, rounding == 'rotated')
            torch.testing.assert_close(
                found * scale, squares.float(), rtol=0.1, atol=0
            )

    def test_of_a_batch_norm(self):
        channels = 4
        norm = nn.BatchNorm2d(channels)
        convert_model(
            nn.Sequential(norm),
            dict(base='L2', norm=2),
            generator=RoundingGenerator(seed=1),
        )
        nn.init.uniform_(norm.weight, 0.5, 2)
        x = torch.randn(4, channels, 8, 8).requires_grad_()
        grad = torch.randn(4, channels, 8, 8) + 0.5 * x.detach()
        twin = nn.BatchNorm2d(channels)
        twin.load_state_dict(norm.state_dict())
        twin(x).backward(grad)
        exact, exact_weight = x.grad, twin.weight.grad
        invstd = torch.rsqrt(x.detach().var((0, 2, 3), correction=0) + 1e-5)
        own, propagated_variance = sensitivity.batch_norm_variance(
            norm.quantizer.pack(x.detach()),
            grad,
            exact,
            exact_weight,
            norm.weight,
            invstd,
        )
        errors = []
        for _ in range(100):
            x.grad = norm.weight.grad = None
            norm(x).backward(grad)
            errors.append(
                (
                    (norm.weight.grad - exact_weight).square().sum(),
                    (x.grad - exact).square().sum() / exact.square().sum(),
                )
            )
        measured = torch.tensor(errors).mean(0)
        expected = at_bits(2) * torch.stack([own, propagated_variance])
        assert (0.7 < measured / expected).all()
        assert (measured / expected < 1.4).all()


class TestSamples:
    def test_samples_of_wide_ranges_get_more_bits(self, device):
        net = make_net().to(device)
        train(net, range(4), device)
        layer_bits = net.stem.quantizer.layer_bits
        layer_bits.bits = 3
        row_bits, row_starts, total = layer_bits.row_bits(
            batch(0, device=device), 256
        )
        assert total == int(row_bits.sum()) == 12
        assert row_bits.tolist() == sorted(row_bits.tolist())
        assert row_bits[0] < row_bits[-1]

    def test_gradients_count(self, device):
        level = dict(use_gradient=True)
        net = make_net(level, num_samples=8).to(device)
        precision = get_precision(net)
        weights = torch.tensor([1e-3, 1.0, 1.0, 10.0], device=device)
        images = torch.randn(4, 3, 16, 16, device=device)
        for _ in range(3):
            precision.set_samples([6, 2, 3, 1])
            loss = (net(images).square().mean(1) * weights).sum()
            loss.backward()
        precision.end_pass()
        history = precision.state_dict()['history']
        assert history.shape == (8, len(precision.layers))
        body = history[:, net.body.quantizer.layer_bits.index].float()
        assert body[6] < 0.1 * body[2] < body[1]
        assert body[[0, 4, 5, 7]].eq(1).all()

        layer_bits = net.body.quantizer.layer_bits
        layer_bits.bits = 3
        precision.set_samples([6, 2, 3, 1])
        precision.begin_pass()
        bits, _, total = layer_bits.row_bits(images, 256)
        assert total == 12
        assert bits[0] < bits[1] <= bits[3]

    def test_a_loss_scale_does_not_matter(self):
        histories = []
        for scale in (1, 1024):
            net = make_net(dict(use_gradient=True), num_samples=4)
            precision = get_precision(net)
            for step in range(3):
                precision.set_samples(range(4))
                (net(batch(step)).square().mean() * scale).backward()
            precision.end_pass()
            histories.append(precision.state_dict()['history'].float())
        torch.testing.assert_close(*histories, rtol=0.05, atol=1e-3)

    def test_other_batch_sizes_go_by_ranges_alone(self, device):
        net = make_net(dict(use_gradient=True), num_samples=4).to(device)
        get_precision(net).set_samples([0, 1])
        net(batch(0, device=device)).sum().backward()
        get_precision(net).end_pass()
        assert net.stem.weight.grad.isfinite().all()
        history = get_precision(net).state_dict()['history']
        assert history is None or history.eq(1).all()

    def test_repeated_samples(self):
        net = make_net(dict(use_gradient=True), num_samples=4)
        get_precision(net).set_samples([2, 2, 2, 2])
        net(batch(0)).square().mean().backward()
        get_precision(net).end_pass()
        history = get_precision(net).state_dict()['history']
        assert history[2, 0] == 1  # the mean of all, relative to itself

    @pytest.mark.parametrize('indices', [[4], [-1, 0]])
    def test_indices_out_of_range(self, indices):
        net = make_net(dict(use_gradient=True), num_samples=4)
        wrong = indices[0]
        with pytest.raises(ValueError, match=f'0 and 3.*{wrong}'):
            get_precision(net).set_samples(indices)

    def test_indices_without_a_history(self):
        with pytest.raises(RuntimeError, match='num_samples'):
            get_precision(make_net()).set_samples([0])

    def test_empty_batch(self, device):
        net = make_net().to(device)
        out = net.stem(torch.empty(0, 3, 8, 8, device=device))
        out.sum().backward()
        assert net.stem.weight.grad.eq(0).all()


class TestState:
    @pytest.mark.parametrize('use_gradient', [False, True])
    @pytest.mark.parametrize('stop', [1, 2, 3, 5])
    def test_goes_on_as_if_never_stopped(self, stop, use_gradient):
        level = dict(use_gradient=use_gradient)
        nets = [make_net(level, num_samples=8) for _ in range(2)]

        def run(net, steps):
            generator = net.stem.quantizer.generator

            def before(step):
                generator.seek(step << 32)
                if use_gradient:
                    start = 4 * (step % 2)
                    get_precision(net).set_samples(range(start, start + 4))

            losses = train(net, steps, before=before)
            get_precision(net).end_pass()
            return losses

        whole = run(nets[0], range(8))
        run(nets[1], range(stop))
        buffer = io.BytesIO()
        state = dict(
            net=nets[1].state_dict(),
            precision=get_precision(nets[1]).state_dict(),
        )
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=False)
        again = make_net(level, seed=9, num_samples=8)
        again.stem.quantizer.generator.manual_seed(5)
        again.load_state_dict(state['net'])
        get_precision(again).load_state_dict(state['precision'])
        assert run(again, range(stop, 8)) == whole[stop:]
        assert get_precision(again).bits == get_precision(nets[0]).bits
        for a, b in zip(again.parameters(), nets[0].parameters()):
            assert_same_bits(a, b)

    def test_is_a_copy(self):
        nets = [make_net(dict(use_gradient=True), num_samples=8) for _ in '12']
        precisions = [get_precision(net) for net in nets]

        def step(net, index):
            get_precision(net).set_samples(range(4))
            train(net, [index])
            get_precision(net).end_pass()

        step(nets[0], 0)
        state = precisions[0].state_dict()
        saved = copy.deepcopy(state)
        precisions[1].load_state_dict(state)
        for net in nets:
            step(net, 1)
            assert not torch.equal(
                get_precision(net).state_dict()['history'], saved['history']
            )
        torch.testing.assert_close(state, saved, rtol=0, atol=0)

    def test_of_other_layers(self):
        state = get_precision(make_net()).state_dict()
        other = make_net(exclude=['body'])
        with pytest.raises(ValueError, match='other layers.*body'):
            get_precision(other).load_state_dict(state)

    def test_of_another_dataset(self):
        nets = [
            make_net(dict(use_gradient=True), num_samples=n) for n in (8, 9)
        ]
        get_precision(nets[0]).set_samples(range(4))
        train(nets[0], range(1))
        get_precision(nets[0]).end_pass()
        state = get_precision(nets[0]).state_dict()
        with pytest.raises(ValueError, match='8 samples, expected 9'):
            get_precision(nets[1]).load_state_dict(state)

    @pytest.mark.parametrize('kwargs', [dict(num_samples=0), dict(interval=0)])
    def test_arguments(self, kwargs):
        with pytest.raises(ValueError, match='got 0'):
            AdaptivePrecision(**kwargs)


class TestSeparation:
    def test_two_models(self):
        nets = [make_net(), make_net(dict(conv=3, norm=3))]
        train(nets[0], range(6))
        assert set(get_precision(nets[1]).bits.values()) == {3}
        assert get_precision(nets[0]) is not get_precision(nets[1])

    def test_a_copy_goes_its_own_way(self):
        net = make_net()
        train(net, range(3))
        twin = copy.deepcopy(net)
        before = get_precision(twin).bits
        assert before == get_precision(net).bits
        train(net, range(3, 12))
        assert get_precision(twin).bits == before
        passes = get_precision(net)._passes
        train(twin, range(3, 12))
        assert get_precision(net)._passes == passes
        assert get_precision(twin).bits == get_precision(net).bits

    def test_pickle_from_before_codes_were_rotated(self):
        net = make_net(dict(rounding='rotated'))
        precision = get_precision(net)
        assert precision.rotated
        state = precision.__getstate__()
        del state['rotated']
        old = object.__new__(AdaptivePrecision)
        old.__setstate__(state)
        assert not old.rotated

    def test_pickle(self):
        net = make_net()
        train(net, range(3))
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
        assert get_precision(twin).bits == get_precision(net).bits
        train(twin, range(3, 6))

    def test_eval_and_no_grad_are_no_passes(self):
        net = make_net()
        with torch.no_grad():
            net(batch(0))
        net.eval()(batch(0)).sum().backward()
        assert get_precision(net)._passes == 0

    def test_another_level_begins_anew(self):
        net = make_net()
        train(net, range(4))
        old = get_precision(net)
        convert_model(net, 'L3')
        assert get_precision(net) is not old
        train(net, range(1))
        assert old._passes == 4
        convert_model(net, 'L2')
        assert not net._forward_pre_hooks
        with pytest.raises(ValueError, match='with 0'):
            get_precision(net)

    def test_revert(self):
        net = make_net()
        revert_model(net)
        assert not net._forward_pre_hooks
        assert type(net.stem) is nn.Conv2d

    def test_parts_converted_apart(self):
        net = Net()
        convert_model(net, 'L3', include=['stem', 'norm'])
        convert_model(net, 'L3', include=['body'])
        with pytest.raises(ValueError, match='with 2'):
            get_precision(net)
        train(net, range(4))
        assert all(
            len(q.layers) for q in (net.stem.quantizer.layer_bits.precision,)
        )


def call_parts(net, x):
    """Forward pass of the network by its layers, without a call of it."""
    x = net.frozen(net.relu(net.norm(net.stem(x))))
    x = net.pool(net.body(net.pool(net.body(x))))
    return net.fc(x.mean((2, 3)))


class TestPasses:
    """A pass begins with a call of a layer, whoever calls it."""

    @staticmethod
    def bits(step, steps=6, **kwargs):
        # So many bits that no noise decides on the allocation.
        net = make_net(dict(conv=6, norm=6), **kwargs)
        for i in range(steps):
            step(net, batch(i).requires_grad_())
        return get_precision(net).bits, get_precision(net)._passes

    @pytest.mark.parametrize(
        'step',
        [
            lambda net, x: net.forward(x),
            call_parts,
            lambda net, x: checkpoint(net, x, use_reentrant=False),
            lambda net, x: checkpoint(net, x, use_reentrant=True),
        ],
        ids=['forward', 'parts', 'checkpoint', 'reentrant'],
    )
    def test_however_the_model_is_called(self, step):
        def run(call):
            return self.bits(
                lambda net, x: call(net, x).square().mean().backward()
            )

        bits, passes = run(step)
        assert (bits, passes) == run(lambda net, x: net(x))
        assert passes == 6
        assert len({bits[name] for name in SEEN}) > 1

    def test_two_forward_passes_before_one_backward_pass(self):
        def step(net, x):
            (net(x).square().mean() + net(x.flip(-1)).mean()).backward()

        assert self.bits(step)[1] == 6

    def test_two_backward_passes_of_one_forward_pass(self):
        def step(net, x):
            loss = net(x).square().mean()
            torch.autograd.grad(loss, net.fc.weight, retain_graph=True)
            loss.backward()

        assert self.bits(step)[1] == 6

    def test_calls_without_gradients_begin_none(self):
        def step(net, x):
            with torch.no_grad():
                net(x)
            net(x).sum().backward()
            with torch.no_grad():
                net(x)
            net.eval()(x).sum().backward()
            net.train()

        assert self.bits(step)[1] == 6

    def test_a_block_that_runs_again_in_a_later_pass(self, monkeypatch):
        """As a generator that is checkpointed, behind a discriminator."""
        choices = itertools.cycle([1, 4, 8, 2])
        monkeypatch.setattr(
            controller,
            'allocate_bits',
            lambda costs, *_: [next(choices)] * len(costs),
        )

        class GAN(nn.Module):
            def __init__(self):
                super().__init__()
                parts = [
                    nn.Sequential(
                        nn.Conv2d(3, 8, 3, padding=1),
                        nn.BatchNorm2d(8),
                        nn.ReLU(),
                        nn.Conv2d(8, 3, 3, padding=1),
                    )
                    for _ in range(2)
                ]
                self.generate, self.judge = parts

        torch.manual_seed(0)
        net = GAN()
        level = dict(base='L3', image=None, fuse=False)
        convert_model(net, level, generator=RoundingGenerator(seed=5))
        seen = set()
        for i in range(12):
            fake = checkpoint(
                net.generate, batch(i).requires_grad_(), use_reentrant=False
            )
            real = batch(50 + i)
            loss = net.judge(real).mean() - net.judge(fake.detach()).mean()
            loss.backward()
            checkpoint(net.judge, fake, use_reentrant=False).mean().backward()
            seen.add(tuple(get_precision(net).bits.values()))
        assert len(seen) > 1
        assert get_precision(net)._passes == 24

    def test_a_replica_in_another_thread_begins_no_second_pass(self):
        def step(net, x):
            calls = [
                threading.Thread(target=net.stem, args=(x,)) for _ in range(8)
            ]
            for call in calls:
                call.start()
            for call in calls:
                call.join()
            net(x).sum().backward()

        assert self.bits(step)[1] == 6


def test_all_processes_agree(device):
    first, second = run_in_processes(
        train_distributed, 2, device.type, device.type
    )
    assert first['bits'] == second['bits']
    assert len(set(first['bits'].values())) > 1
    torch.testing.assert_close(first['history'], second['history'])
    assert first['history'].ne(1).any(1).all()


def test_processes_that_call_other_layers_agree(device):
    first, second = run_in_processes(train_apart, 2, device.type, device.type)
    assert first == second and first['passes'] == 8
    assert len(set(first['bits'].values())) > 1


def test_checkpointed_blocks(device):
    class Checkpointed(Net):
        def forward(self, x):
            x = checkpoint(
                lambda t: self.relu(self.norm(self.stem(t))),
                x,
                use_reentrant=False,
            )
            return self.fc(self.body(x).mean((2, 3)))

    net = Checkpointed().to(device)
    convert_model(net, 'L3')
    train(net, range(6), device)
    places = {n: v[4] for n, v in get_precision(net)._averages.items()}
    assert places['fc'] < places['body'] < places['norm'] < places['stem']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('use_gradient', [False, True])
def test_no_synchronisation(use_gradient):
    net = make_net(dict(use_gradient=use_gradient), num_samples=4).cuda()
    images = batch(0, device='cuda')

    def step():
        if use_gradient:
            get_precision(net).set_samples(range(4))
        net(images).square().mean().backward()

    for _ in range(5):
        step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(5):  # with the reports of pass 8
            step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
