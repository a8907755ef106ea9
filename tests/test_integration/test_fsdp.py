"""FSDP by MMEngine's strategy and by torch, against DDP."""

import pytest
import torch
from support.distributed_cases import (
    Branches,
    run_fsdp,
    train_in_two_processes,
)
from support.layers import assert_same_bits

LEVELS = ('L0', 'L3')


@pytest.fixture(scope='module')
def results():
    """Results of each process, by case and level."""
    trained = train_in_two_processes(run_fsdp)
    return lambda name, level: [found[name, level] for found in trained]


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_same_bits(value, expected[name])


class TestStrategy:
    @pytest.mark.parametrize('level', LEVELS)
    def test_trains_as_ddp(self, results, level):
        # The same numbers round the same tensors.
        for found, expected in zip(
            results('strategy', level), results('plain', level)
        ):
            assert_same_weights(found['model'], expected['model'])
            assert found['bits'] == expected['bits']

    def test_l0_is_plain_fsdp(self, results):
        exact, plain = (results('strategy', level) for level in ('L0', None))
        assert_same_weights(exact[0]['model'], plain[0]['model'])

    @pytest.mark.parametrize('level', LEVELS)
    def test_gathered_parameters_are_no_activations(self, results, level):
        found = results('strategy', level)[0]['saved_mib']
        assert found == results('plain', level)[0]['saved_mib']

    def test_goes_on(self, results):
        for found, expected in zip(
            results('resumed', 'L3'), results('unbroken', 'L3')
        ):
            assert_same_weights(found['model'], expected['model'])
            assert found['bits'] == expected['bits']

    def test_activation_checkpointing(self, results):
        exact, plain = (
            results(name, 'L0')[0] for name in ('checkpointing', 'strategy')
        )
        assert_same_weights(exact['model'], plain['model'])
        assert max(exact['saved_mib']) < min(plain['saved_mib'])
        coded = results('checkpointing', 'L3')[0]
        assert max(coded['saved_mib']) < min(exact['saved_mib'])
        for name, value in coded['model'].items():
            assert value.isfinite().all(), name

    def test_names_are_those_of_the_plain_model(self, results):
        # Rules are by name, and so are the bits of all other layers.
        found = results('rules', 'L3')[0]
        assert set(found['bits']) == {'stem.1', 'odd.0', 'odd.1', 'head'}

    def test_swapping_is_refused(self, results):
        assert "Use level='L3' with FSDP" in results('refused', 'L4')[0]

    def test_full_checkpoint_fits_the_plain_model(self, results):
        found = results('rules', 'L3')[0]
        model = Branches()
        model.load_state_dict(found['checkpoint'], strict=True)
        assert_same_weights(dict(model.named_parameters()), found['model'])


@pytest.mark.parametrize('level', LEVELS)
def test_fully_shard_trains_as_ddp(results, level):
    for found, expected in zip(results('fsdp2', level), results('ddp', level)):
        assert_same_weights(found['model'], expected['model'])
        assert found['bits'] == expected['bits']


def test_fully_shard_before_conversion(results):
    exact = results('fsdp2, converted last', 'L0')[0]['model']
    assert_same_weights(exact, results('ddp', 'L0')[0]['model'])
    coded = results('fsdp2, converted last', 'L3')[0]
    # So is a layer that is a unit by itself, and has a class of FSDP's.
    assert 'head' in coded['bits']
    assert all(v.isfinite().all() for v in coded['model'].values())
    assert any(
        not torch.equal(value, exact[name])
        for name, value in coded['model'].items()
    )
