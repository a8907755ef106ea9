"""The source of random bits: its own sequence, and nobody else's."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import mmactnn
from mmactnn import RoundingGenerator, convert_model
from mmactnn.random import default_generator

CPU = torch.device('cpu')


def take(generator, count=4):
    return [generator.next(CPU)[:2] for _ in range(count)]


@pytest.fixture
def shared():
    """The generator of unconverted layers, put back afterwards."""
    before = copy.deepcopy(default_generator.__dict__)
    yield default_generator
    default_generator.__dict__.update(before)


class TestSequence:
    def test_no_pair_twice(self):
        pairs = set(take(RoundingGenerator(seed=1), 1000))
        assert len(pairs) == 1000
        for key, offset in pairs:
            assert 0 <= key < 2**64 and 0 <= offset < 2**64

    def test_same_seed_same_sequence(self):
        assert take(RoundingGenerator(5)) == take(RoundingGenerator(5))

    def test_streams_and_seeds_differ(self):
        # All keys, also of neighbours such as the ranks of a run.
        keys = [
            RoundingGenerator(seed, stream).next(CPU).seed
            for seed in range(40)
            for stream in range(40)
        ]
        assert len(set(keys)) == len(keys)

    def test_keys_look_random(self):
        # Near seeds must not give near keys: half of the bits differ.
        keys = [RoundingGenerator(seed).next(CPU).seed for seed in range(200)]
        flips = [(a ^ b).bit_count() for a, b in zip(keys, keys[1:])]
        # 199 binomial variables of 64 halves: mean 32, deviation 4.
        assert abs(sum(flips) / len(flips) - 32) < 5 * 4 / 199**0.5
        assert min(flips) > 10

    def test_seek(self):
        generator = RoundingGenerator(seed=1)
        pairs = take(generator, 8)
        generator.seek(5)
        assert take(generator, 1) == [pairs[5]]

    def test_wide_seeds(self):
        for seed in (2**63, 2**64 - 1, -1, 0):
            key = RoundingGenerator(seed).next(CPU).seed
            assert 0 <= key < 2**64

    def test_offset_beyond_64_bits(self):
        generator = RoundingGenerator(seed=1)
        generator.seek(2**64 - 1)
        assert [offset for _, offset in take(generator, 2)] == [2**64 - 1, 0]


class TestSeeding:
    def test_follows_torch(self):
        generator = RoundingGenerator()
        torch.manual_seed(1)
        assert generator.seed == 1
        first = take(generator)
        torch.manual_seed(2)
        assert take(generator) != first
        torch.manual_seed(1)
        assert take(generator) == first
        assert first == take(RoundingGenerator(seed=1))

    def test_seed_of_its_own(self):
        generator = RoundingGenerator(seed=3)
        first = take(generator)
        torch.manual_seed(77)
        # Goes on as if nothing had happened.
        rest = take(generator)
        assert first + rest == take(RoundingGenerator(seed=3), 8)

    def test_manual_seed_starts_anew(self):
        generator = RoundingGenerator(seed=3)
        take(generator)
        generator.manual_seed(4, stream=2)
        assert take(generator) == take(RoundingGenerator(4, 2))
        generator.manual_seed(None)
        assert generator.seed == torch.initial_seed()

    def test_shared_generator(self, shared):
        def draw():
            conv = mmactnn.QConv2d(3, 4, 3)
            torch.nn.init.constant_(conv.weight, 0.1)
            x = torch.linspace(0, 1, 3 * 36).view(1, 3, 6, 6)
            conv(x).sum().backward()
            return conv.weight.grad

        mmactnn.manual_seed(5)
        first, second = draw(), draw()
        mmactnn.manual_seed(5)
        assert torch.equal(draw(), first)
        assert not torch.equal(first, second)

    def test_manual_seed_reaches_converted_models(self, shared):
        seeds = RoundingGenerator(), RoundingGenerator(stream=1)
        fixed = RoundingGenerator(seed=3)
        take(fixed)
        mmactnn.manual_seed(5)
        first = [take(generator) for generator in seeds]
        assert first[0] == take(RoundingGenerator(seed=5))
        assert first[0] != first[1]
        torch.manual_seed(6)
        assert take(seeds[0]) == take(RoundingGenerator(seed=5), 8)[4:]
        mmactnn.manual_seed(5)
        assert [take(generator) for generator in seeds] == first
        assert take(fixed) == take(RoundingGenerator(seed=3), 8)[4:]
        mmactnn.manual_seed(None)
        assert seeds[0].seed == torch.initial_seed() == 6
        with pytest.raises(TypeError, match="got '5'"):
            mmactnn.manual_seed('5')

    def test_state(self):
        generator = RoundingGenerator(seed=3, stream=1)
        take(generator, 3)
        state = pickle.loads(pickle.dumps(generator.state_dict()))
        expected = take(generator)
        other = RoundingGenerator()
        other.load_state_dict(state)
        assert take(other) == expected

    def test_state_of_one_that_follows(self):
        torch.manual_seed(1)
        generator = RoundingGenerator()
        take(generator, 3)
        state = generator.state_dict()
        expected = take(generator)
        torch.manual_seed(2)
        generator.load_state_dict(state)
        assert take(generator) == expected


class TestOtherStreams:
    def test_are_not_disturbed(self, device):
        def states():
            cuda = torch.cuda.is_available()
            return (
                torch.get_rng_state().tolist(),
                torch.cuda.get_rng_state().tolist() if cuda else None,
                random.getstate(),
                np.random.get_state()[1].tolist(),
            )

        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        model.to(device)
        x = torch.randn(2, 3, 8, 8, device=device)
        before = states()
        convert_model(model, 'L3')
        model(x).sum().backward()
        mmactnn.QConv2d(3, 4, 3).reset_parameters()
        assert states()[0] != before[0]  # so that the rest can fail
        torch.manual_seed(0)
        before = states()
        model(x).sum().backward()
        convert_model(model, 'L2')
        model(x).sum().backward()
        assert states() == before

    def test_same_numbers_with_and_without_compression(self, device):
        def draw(level):
            torch.manual_seed(9)
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5))
            model.to(device)
            # A compressed dropout has masks of its own.
            convert_model(model, level, exclude=[nn.Dropout])
            output = model(torch.ones(1, 3, 8, 8, device=device))
            output.sum().backward()
            return output, torch.randn(5), torch.randn(5, device=device)

        for exact, compressed in zip(draw('L0'), draw('L3')):
            assert torch.equal(exact, compressed)


class TestModels:
    @staticmethod
    def make_model():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))

    def test_one_generator_a_model(self):
        model, other = self.make_model(), self.make_model()
        convert_model(model)
        convert_model(other)
        first, second = (layer.quantizer.generator for layer in model)
        assert first is second
        assert first is not other[0].quantizer.generator
        assert first is not default_generator

    def test_given_generator(self):
        generator = RoundingGenerator(seed=1)
        model = self.make_model()
        convert_model(model, generator=generator)
        assert model[0].quantizer.generator is generator

    def test_copy_of_a_model(self):
        model = self.make_model()
        convert_model(model, generator=RoundingGenerator(seed=1))
        generator = model[0].quantizer.generator
        twin = copy.deepcopy(model)
        first, second = (layer.quantizer.generator for layer in twin)
        assert first is second and first is not generator
        # Rounding in the copy leaves the original's sequence alone.
        take(first, 3)
        assert generator.next(CPU).offset == 0

    def test_copy_of_a_layer_shares_the_shared_one(self):
        twin = copy.deepcopy(mmactnn.QConv2d(3, 4, 3))
        assert twin.quantizer.generator is default_generator

    def test_pickle(self):
        model = self.make_model()
        convert_model(model, generator=RoundingGenerator(seed=1, stream=2))
        take(model[0].quantizer.generator, 3)
        twin = pickle.loads(pickle.dumps(model))
        first, second = (layer.quantizer.generator for layer in twin)
        assert first is second
        assert take(first) == take(model[0].quantizer.generator)
        layer = pickle.loads(pickle.dumps(mmactnn.QConv2d(3, 4, 3)))
        assert layer.quantizer.generator is default_generator


class TestCapture:
    """Draws for a CUDA graph, its counter on the CPU."""

    GPU = torch.device('cuda', 0)

    @pytest.fixture(autouse=True)
    def _capturing(self, monkeypatch):
        monkeypatch.setattr(
            torch.cuda, 'is_current_stream_capturing', lambda: True
        )

    def warm(self, generator):
        """Counter of a generator after an eager draw on the GPU."""
        counter = torch.zeros(1, dtype=torch.int64)
        generator._counters[self.GPU] = counter
        return counter

    def test_draws_count_on_the_device(self):
        generator = RoundingGenerator(seed=1)
        counter = self.warm(generator)
        draws = [generator.next(self.GPU) for _ in range(100)]
        # Each keeps its value, for decoding, while the counter moves on.
        assert [draw.offset_tensor.item() for draw in draws] == [
            *range(1, 101)
        ]
        assert counter.item() == 100
        # Each has a key of its own, also different from that of eager draws.
        keys = {draw.seed for draw in draws}
        assert len(keys) == 100 and generator.next(CPU).seed not in keys
        assert all(0 <= key < 2**64 for key in keys)

    def test_keys_follow_the_sequence(self):
        def keys(seed, start):
            generator = RoundingGenerator(seed)
            self.warm(generator)
            generator.seek(start)
            return [generator.next(self.GPU).seed for _ in range(3)]

        assert keys(1, 5) == keys(1, 5)
        assert not set(keys(1, 5)) & set(keys(1, 8))
        assert not set(keys(1, 5)) & set(keys(2, 5))

    def test_the_first_draw_is_none_of_a_graph(self):
        with pytest.raises(RuntimeError, match='side stream'):
            RoundingGenerator(seed=0).next(self.GPU)

    def test_counters_stay_with_the_generator(self):
        generator = RoundingGenerator(seed=1)
        counter = self.warm(generator)
        generator.next(self.GPU)
        for twin in (
            copy.deepcopy(generator),
            pickle.loads(pickle.dumps(generator)),
        ):
            assert take(twin, 2) == take(copy.deepcopy(generator), 2)
            with pytest.raises(RuntimeError, match='side stream'):
                twin.next(self.GPU)
        generator.load_state_dict(generator.state_dict())
        # Graphs hold its address.
        generator.next(self.GPU)
        assert counter.item() == 2
