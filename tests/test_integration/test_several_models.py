"""Models side by side, and models made of models, share nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from support.layers import assert_same_bits
from torch import nn

from mmactnn import (
    QuantizedLayer,
    RoundingGenerator,
    convert_model,
    get_precision,
    revert_model,
)


def make_net(seed, level, outputs=4):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 16, outputs),
    )
    if level is not None:
        convert_model(net, level, generator=RoundingGenerator(seed))
    return net


def images(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator)


def update(net, loss):
    net.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.05 * parameter.grad


def assert_equal(net, other):
    for a, b in zip(net.state_dict().values(), other.state_dict().values()):
        assert_same_bits(a, b)


class TestTwoModels:
    LEVELS = ('L3', 'L2', 'L0', dict(conv=4, norm=3))

    @pytest.mark.parametrize('other', LEVELS, ids=str)
    def test_in_turn_as_alone(self, other):
        alone = [make_net(0, 'L3'), make_net(1, other)]
        for net in alone:
            for step in range(6):
                update(net, net(images(step)).square().mean())
        together = [make_net(0, 'L3'), make_net(1, other)]
        for step in range(6):
            for net in together:
                update(net, net(images(step)).square().mean())
        for a, b in zip(together, alone):
            assert_equal(a, b)

    @pytest.mark.parametrize('training', [False, True])
    def test_a_frozen_teacher(self, training):
        student = make_net(0, 'L3')
        teacher = make_net(1, 'L2').requires_grad_(False).train(training)
        plain = copy.deepcopy(teacher)
        revert_model(plain)
        before = copy.deepcopy(dict(teacher.named_parameters()))
        for step in range(6):
            x = images(step)
            target = teacher(x)
            assert_same_bits(target, plain(x))
            assert not target.requires_grad
            update(student, F.mse_loss(student(x), target))
        for name, parameter in teacher.named_parameters():
            assert_same_bits(parameter, before[name])
        assert get_precision(student)._passes == 6


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3 * 64)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z):
        return self.conv(self.fc(z).view(-1, 3, 8, 8))


def train_gan(level):
    torch.manual_seed(0)
    makes = Generator()
    judges = make_net(1, None, outputs=1)
    if level is not None:
        convert_model(makes, level, generator=RoundingGenerator(0))
        convert_model(judges, level, generator=RoundingGenerator(1))
    for step in range(5):
        z = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        fake = makes(z)
        scores = judges(images(step)), judges(fake.detach())
        update(
            judges,
            F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean(),
        )
        judges.requires_grad_(False)
        update(makes, F.softplus(-judges(fake)).mean())
        judges.requires_grad_(True)
    return makes, judges


class TestGAN:
    def test_exact_level(self):
        for ours, reference in zip(train_gan('L0'), train_gan(None)):
            assert_equal(ours, reference)

    @pytest.mark.parametrize('level', ['L2', 'L3'])
    def test_trains(self, level):
        makes, judges = train_gan(level)
        for net in (makes, judges):
            for parameter in net.parameters():
                assert parameter.isfinite().all()
        if level == 'L3':
            # The judge sees real and fake images, and those once more.
            assert get_precision(makes)._passes == 5
            assert get_precision(judges)._passes == 15


class TestEMA:
    def test_copy(self):
        net = make_net(0, 'L3')
        average = ExponentialMovingAverage(net, momentum=0.5)
        expected = copy.deepcopy(net)
        revert_model(expected)
        for step in range(5):
            update(net, net(images(step)).square().mean())
            average.update_parameters(net)
            with torch.no_grad():
                for a, b in zip(expected.parameters(), net.parameters()):
                    if step == 0:
                        a.copy_(b)
                    else:
                        a.lerp_(b, 0.5)
        pairs = zip(net.modules(), average.module.modules())
        for a, b in pairs:
            if isinstance(a, QuantizedLayer):
                assert a.quantizer is not b.quantizer
                assert a.quantizer.generator is not b.quantizer.generator
        assert get_precision(average.module) is not get_precision(net)
        assert get_precision(average.module)._passes == 0
        for a, b in zip(average.module.parameters(), expected.parameters()):
            torch.testing.assert_close(a, b)
        revert_model(expected)
        expected.load_state_dict(average.module.state_dict())
        x = images(9)
        assert_same_bits(average.module.eval()(x), expected.eval()(x))
