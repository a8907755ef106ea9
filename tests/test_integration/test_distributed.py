"""Two processes against torch in one with all of their samples."""

import pytest
import torch
from support.distributed_cases import (
    CASES,
    STEPS,
    run_ddp,
    train_by_hand,
    train_in_two_processes,
)
from support.layers import assert_same_bits

LEVELS = ('L0', 'L3')


@pytest.fixture(scope='module')
def ddp():
    """Results of each process, by case and level."""
    trained = train_in_two_processes(run_ddp)
    return lambda name, level: [found[name, level] for found in trained]


@pytest.mark.parametrize('name', CASES)
class TestDDP:
    @pytest.mark.parametrize('level', LEVELS)
    def test_processes_agree(self, ddp, name, level):
        first, second = ddp(name, level)
        for key, value in first['model'].items():
            assert_same_bits(value, second['model'][key])
        assert first['bits'] == second['bits']

    def test_l0_is_one_process_with_all_samples(self, ddp, name):
        expected = train_by_hand(**CASES[name])
        found = ddp(name, 'L0')[0]['model']
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-6, check_device=False
        )

    def test_l3_compresses(self, ddp, name):
        exact, coded = (ddp(name, level)[0] for level in LEVELS)
        assert len(coded['saved_mib']) == STEPS
        assert max(coded['saved_mib']) < min(exact['saved_mib'])
        for key, value in coded['model'].items():
            assert value.isfinite().all(), key
        assert any(
            not torch.equal(value, exact['model'][key])
            for key, value in coded['model'].items()
        )


# Torch's own SyncBatchNorm does not run on the CPU.
@pytest.mark.parametrize('name', sorted(CASES.keys() - {'sync'}))
def test_l0_is_plain_ddp(ddp, name):
    plain = ddp(name, None)[0]['model']
    for key, value in ddp(name, 'L0')[0]['model'].items():
        assert_same_bits(value, plain[key])


@pytest.mark.parametrize('name', ['plain', 'unused', 'accumulating'])
def test_bits_move(ddp, name):
    bits = ddp(name, 'L3')[0]['bits']
    assert len(set(bits.values())) > 1, bits


def test_processes_round_apart(ddp):
    # Gradients of the first half of a step, not yet exchanged.
    first, second = (r['first_grad'] for r in ddp('accumulating', 'L3'))
    assert not torch.equal(first, second)
