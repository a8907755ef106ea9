"""More than one converted model in a process."""

import copy

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from support.layers import assert_same_bits, count_packs, exact_numerics
from support.precision_cases import Net, batch, make_net, train
from support.toy import make_runner
from torch import nn
from torch.nn import functional as F

from mmactnn import (
    QuantizedLayer,
    RoundingGenerator,
    convert_model,
    get_precision,
    revert_model,
)

STEPS = 6


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert_same_bits(value, expected[key])


def private_parts(model):
    """Objects that two models must not share."""
    quantizers = [
        m.quantizer for m in model.modules() if isinstance(m, QuantizedLayer)
    ]
    found = quantizers + [q.generator for q in quantizers]
    layers = [q.layer_bits for q in quantizers if q.layer_bits is not None]
    return {
        id(part) for part in found + layers + [s.precision for s in layers]
    }


def make_student(level, device='cpu'):
    net = make_net(level, seed=1, generator=RoundingGenerator(seed=7))
    return net.to(device)


def make_teacher(kind, device='cpu'):
    """A frozen network; ``kind`` tells how."""
    if kind == 'plain':
        torch.manual_seed(2)
        net = Net()
    else:
        net = make_net('L3', seed=2, generator=RoundingGenerator(seed=8))
    net.requires_grad_(False).train(kind == 'train mode')
    return net.to(device)


def distil(student, teacher, device='cpu'):
    """Some steps of distillation."""
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.05)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        images = batch(step, device=device)
        loss = F.mse_loss(student(images), teacher(images))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TestTwoModels:
    @pytest.mark.parametrize(
        'levels', [('L3', 'L3'), ('L3', 'L2'), ('L1', dict(conv=3, norm=3))]
    )
    def test_in_turn_as_alone(self, levels, device):
        def make(index):
            generator = RoundingGenerator(seed=20 + index)
            net = make_net(levels[index], seed=index, generator=generator)
            return net.to(device)

        alone = [make(index) for index in range(2)]
        losses = [train(net, range(STEPS), device) for net in alone]
        turns = [make(index) for index in range(2)]
        for step in range(STEPS):
            for index, net in enumerate(turns):
                assert train(net, [step], device) == [losses[index][step]]
        for net, expected in zip(turns, alone):
            assert_same_weights(net, expected)
        assert not private_parts(turns[0]) & private_parts(turns[1])

    def test_the_seed_matters(self):
        """Else the test above could not fail."""
        nets = [
            make_net('L3', generator=RoundingGenerator(seed=seed))
            for seed in (20, 21)
        ]
        losses = [train(net, range(STEPS)) for net in nets]
        assert losses[0][0] == losses[1][0]
        assert losses[0][-1] != losses[1][-1]


class TestDistillation:
    @pytest.mark.parametrize('kind', ['eval', 'train mode'])
    @pytest.mark.parametrize('level', ['L2', 'L3'])
    def test_frozen_teacher(self, level, kind, device, monkeypatch):
        student = make_student(level, device)
        teacher = make_teacher(kind, device)
        before = {k: v.clone() for k, v in teacher.named_parameters()}
        losses = distil(student, teacher, device)

        # A plain teacher of the same mode says the same.
        alone = make_student(level, device)
        plain = make_teacher('plain', device).train(kind == 'train mode')
        assert distil(alone, plain, device) == losses
        assert_same_weights(student, alone)
        assert_same_weights(teacher, plain)
        for name, parameter in teacher.named_parameters():
            assert parameter.grad is None
            assert_same_bits(parameter, before[name])
        # It has learnt nothing of its own bits.
        assert set(get_precision(teacher).bits.values()) == {2}
        assert get_precision(teacher).state_dict()['averages'] == {}

        packed = count_packs(monkeypatch)
        teacher(batch(0, device=device))
        assert packed == []

    def test_parts_of_one_module(self, device):
        """As models of MMRazor: the teacher is a submodule."""
        both = nn.ModuleDict(
            dict(student=Net(), teacher=Net().requires_grad_(False))
        ).to(device)
        convert_model(both.student, 'L3', generator=RoundingGenerator(seed=7))
        convert_model(both.teacher, 'L3')
        both.train()
        distil(both.student, both.teacher, device)
        bits = get_precision(both.student).bits
        assert len(set(bits.values())) > 1
        assert set(get_precision(both.teacher).bits.values()) == {2}


def make_gan(level, device):
    """Generator and discriminator, converted apart; ``level`` may be None."""
    torch.manual_seed(3)
    generator = nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(16, 3, 4, 4),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(16, 16, 4, 2, 1),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Flatten(),
        nn.Linear(256, 1),
    )
    nets = generator.to(device), discriminator.to(device)
    if level is not None:
        for seed, net in enumerate(nets):
            convert_model(net, level, generator=RoundingGenerator(seed=seed))
    return nets


def train_gan(nets, device, steps=STEPS):
    """Some steps of a GAN.

    Returns:
        list[float]: Losses of the discriminator and of the generator.
    """
    generator, discriminator = nets
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    losses = []

    def finish(net, loss):
        loss.backward()
        for parameter in net.parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()
        losses.append(loss.item())

    for step in range(steps):
        noise = torch.Generator().manual_seed(step)
        noise = torch.randn(4, 8, 1, 1, generator=noise).to(device)
        discriminator.requires_grad_(True)
        optimizers[1].zero_grad()
        real = discriminator(batch(step, device=device))
        fake = discriminator(generator(noise).detach())
        finish(
            discriminator, F.softplus(fake).mean() + F.softplus(-real).mean()
        )
        optimizers[1].step()

        discriminator.requires_grad_(False)
        kept = [p.grad.clone() for p in discriminator.parameters()]
        optimizers[0].zero_grad()
        fake = discriminator(generator(noise))
        finish(generator, F.softplus(-fake).mean())
        optimizers[0].step()
        for parameter, grad in zip(discriminator.parameters(), kept):
            assert_same_bits(parameter.grad, grad)
    return losses


class TestGAN:
    def test_exact_level_is_bit_identical(self, device):
        plain, ours = make_gan(None, device), make_gan('L0', device)
        assert train_gan(ours, device) == train_gan(plain, device)
        for net, expected in zip(ours, plain):
            assert_same_weights(net, expected)

    @pytest.mark.parametrize('level', ['L1', 'L2', 'L3'])
    def test_trains(self, level, device):
        nets, plain = make_gan(level, device), make_gan(None, device)
        losses = train_gan(nets, device)
        expected = train_gan(plain, device)
        # Only gradients depend on codes, not the forward pass. Kernels of
        # a GPU add up in another order than torch's.
        rel = 0 if device.type == 'cpu' else 1e-6
        assert losses[0] == pytest.approx(expected[0], rel=rel, abs=0)
        assert losses != expected
        torch.testing.assert_close(losses, expected, rtol=0.05, atol=0.05)

    def test_each_counts_its_own_passes(self, device):
        # Unfused, so that every layer shares out bits.
        nets = make_gan(dict(fuse=False), device)
        generator, discriminator = map(get_precision, nets)
        assert generator is not discriminator
        train_gan(nets, device)
        # A pass ends with a backward pass, however many calls it has.
        assert generator._passes == STEPS
        assert discriminator._passes == 2 * STEPS
        for precision in (generator, discriminator):
            assert precision._averages.keys() == precision.bits.keys()
            costs = [cost for cost, *_ in precision._averages.values()]
            assert all(cost > 0 for cost in costs)

    def test_images_without_grad_are_no_pass(self, device):
        generator, discriminator = make_gan('L3', device)
        noise = torch.randn(4, 8, 1, 1, device=device)
        with torch.no_grad():
            images = generator(noise)
        discriminator(images).sum().backward()
        assert get_precision(generator)._passes == 0
        assert get_precision(discriminator)._passes == 1


class TestMovingAverage:
    @pytest.mark.parametrize('level', ['L0', 'L2', 'L3'])
    def test_shares_nothing_but_follows(self, level, device):
        net = make_student(level, device)
        train(net, range(3), device)
        average = ExponentialMovingAverage(
            net, momentum=0.25, update_buffers=True
        )
        assert private_parts(net)
        assert not private_parts(net) & private_parts(average)
        average.update_parameters(net)
        assert_same_weights(average.module, net)

        before = {k: v.clone() for k, v in net.state_dict().items()}
        train(net, range(3, 6), device)
        average.update_parameters(net)
        after = net.state_dict()
        for key, value in average.module.state_dict().items():
            if value.is_floating_point():
                expected = before[key].lerp(after[key], 0.25)
                torch.testing.assert_close(value, expected)
        moved = average.module.stem.weight
        assert not torch.equal(moved, before['stem.weight'])
        assert not torch.equal(moved, net.stem.weight)

    def test_the_source_goes_on_as_without(self, device):
        alone, net = (make_student('L3', device) for _ in range(2))
        expected = train(alone, range(8), device)
        losses = train(net, range(3), device)
        average = ExponentialMovingAverage(net, momentum=0.25)
        for step in range(3, 8):
            losses += train(net, [step], device)
            average.update_parameters(net)
            average(batch(step, device=device))
        assert losses == expected
        assert_same_weights(net, alone)
        assert get_precision(net).bits == get_precision(alone).bits

    def test_evaluates_as_a_plain_model(self, device):
        net = make_student('L3', device)
        average = ExponentialMovingAverage(net, momentum=0.25)
        for step in range(3):
            train(net, [step], device)
            average.update_parameters(net)
        plain = Net().to(device)
        plain.load_state_dict(average.module.state_dict(), strict=True)
        images = batch(9, device=device)
        actual, expected = average.eval()(images), plain.eval()(images)
        assert_same_bits(actual, expected)
        assert not torch.equal(actual, net.eval()(images))

    @pytest.mark.parametrize('level', ['L2', 'L3'])
    def test_hook(self, level, tmp_path):
        runner = make_runner(
            tmp_path,
            dict(type='ActNNHook', level=level),
            dict(type='EMAHook', momentum=0.25),
            epochs=2,
            evaluates=True,
        )
        runner.train()
        (hook,) = (h for h in runner.hooks if isinstance(h, EMAHook))
        average = hook.ema_model.module
        assert private_parts(average)
        assert not private_parts(average) & private_parts(runner.model)
        plain = revert_model_copy(average)
        images = torch.randn(2, 3, 16, 16)
        actual = average.eval()(images)
        assert_same_bits(actual, plain.eval()(images))
        assert not torch.equal(actual, runner.model.eval()(images))


def revert_model_copy(model):
    """A plain model with the same weights."""
    plain = copy.deepcopy(model)
    assert revert_model(plain)
    assert not any(isinstance(m, QuantizedLayer) for m in plain.modules())
    return plain
