"""Covering sets of parameters."""

import itertools

import pytest
import torch
from support.pairs import (
    case,
    in_turn,
    in_turn_by_group,
    pairs,
    parametrize_pairs,
)

AXES = dict(bits=(1, 2, 4, 8), shape=((), (3, 4)), kind='abc', flag=(0, 1))


def every_pair(rows):
    return {
        part
        for row in rows
        for part in itertools.combinations(sorted(row.items(), key=str), 2)
    }


def product(axes):
    return [dict(zip(axes, row)) for row in itertools.product(*axes.values())]


def test_every_pair_in_few_rows():
    rows = pairs(**AXES)
    assert every_pair(rows) == every_pair(product(AXES))
    # No fewer than the product of the two longest axes.
    assert 12 <= len(rows) <= 15


def test_the_same_at_every_call():
    assert pairs(**AXES) == pairs(**AXES)


def test_two_axes_are_their_product():
    axes = dict(a=(1, 2, 3), b='xy')
    assert sorted(pairs(**axes), key=str) == sorted(product(axes), key=str)


def test_one_axis():
    assert pairs(a=(1, 2)) == [dict(a=1), dict(a=2)]


def test_rows_that_may_not_be():
    def where(bits, shape, **_):
        return bits > 1 or shape

    rows = pairs(where, **AXES)
    assert all(where(**row) for row in rows)
    allowed = [row for row in product(AXES) if where(**row)]
    assert every_pair(rows) == every_pair(allowed)


def test_values_by_name_need_no_hash():
    rows = pairs(a=dict(one=[1], two=[2]), b=([3], [4]))
    assert len(rows) == 4 and dict(a=[2], b=[3]) in rows


def test_names():
    def names(**axes):
        return [p.id for p in parametrize_pairs(**axes).args[1]]

    assert names(
        dtype=[torch.float16],
        shape=[(2, 3), ()],
        bits=[4],
        make=dict(some=object()),
        layout=['gaps'],
        channels_last=[True],
    ) == [
        'float16-2x3-bits=4-some-gaps-channels_last',
        'float16-scalar-bits=4-some-gaps-channels_last',
    ]
    assert names(relu=[True, False]) == ['relu', 'plain']


def test_a_failure_names_its_case():
    with pytest.raises(
        AssertionError, match='case float16, bits=2$'
    ) as raised:
        with case('float16', bits=2):
            raise ValueError('reason')
    assert str(raised.value.__cause__) == 'reason'
    with pytest.raises(AssertionError, match='case a$') as raised:
        with case('a'), pytest.raises(ValueError):
            pass
    assert 'DID NOT RAISE' in str(raised.value.__cause__)


class TestInTurn:
    @pytest.mark.parametrize('b', 'xy')
    def test_runs_with_each(self, b):
        seen = []

        @in_turn([dict(a=1), dict(a=2)])
        def run(a, b):
            seen.append((b, a, torch.rand(()).item()))

        run(b=b)
        assert [(b, 1), (b, 2)] == [turn[:2] for turn in seen]
        assert seen[0][2] == seen[1][2]

    @in_turn_by_group(
        dict(one=dict(p=dict(a=1), q=dict(a=2)), two=[dict(a=3)]),
        unless=lambda a, request: a == 2,
    )
    def test_groups(self, a, request):
        assert request.node.callspec.id == {1: 'one', 3: 'two'}[a]

    @in_turn(by='a', a=[(1, 2), ()], b='xy', c='uv')
    def test_a_test_for_each_value(self, a, b, c, request):
        assert request.node.callspec.id == {2: '1x2', 0: 'scalar'}[len(a)]

    def test_a_failure_names_its_row(self):
        @in_turn([dict(a=1), dict(a=2)])
        def fail(a):
            assert a < 2

        with pytest.raises(AssertionError, match='case a=2$'):
            fail()
