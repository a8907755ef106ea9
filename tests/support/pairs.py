"""Covering sets of parameters, in place of their full product."""

import contextlib
import functools
import heapq
import inspect
import itertools
from collections.abc import Mapping

import pytest
import torch


def pairs(where=None, /, **axes):
    """Few rows in which every two values of two axes come together.

    Greedy, and the same at every call.

    Args:
        where (callable, optional): Takes a row as keywords and says whether
            there may be such a row; pairs that are in no such row are left
            out. Defaults to all of the product.
        **axes: Values of each parameter, as a sequence; or by name, as a
            mapping.

    Returns:
        list[dict]: Values by parameter.
    """
    values = {
        name: list(axis.values() if isinstance(axis, Mapping) else axis)
        for name, axis in axes.items()
    }

    def row_of(places):
        return {
            name: axis[place]
            for (name, axis), place in zip(values.items(), places)
        }

    def parts_of(places):
        count = min(2, len(values))
        return set(itertools.combinations(enumerate(places), count))

    candidates = [
        places
        for places in itertools.product(
            *(range(len(a)) for a in values.values())
        )
        if where is None or where(**row_of(places))
    ]
    missing = set().union(*map(parts_of, candidates))
    # The gain of a row only shrinks, so that an outdated gain is a bound.
    queue = [(-len(missing), place) for place in range(len(candidates))]
    found = []
    while missing:
        _, place = heapq.heappop(queue)
        parts = parts_of(candidates[place])
        bound = -len(parts & missing), place
        if queue and bound > queue[0]:
            heapq.heappush(queue, bound)
            continue
        missing -= parts
        found.append(row_of(candidates[place]))
    return found


def parametrize_pairs(where=None, /, **axes):
    """Decorator that runs a test with each row of :func:`pairs`.

    Args:
        where (callable, optional): As of :func:`pairs`.
        **axes: As of :func:`pairs`; a mapping's keys are in the tests' names.

    Returns:
        pytest.MarkDecorator: With readable names of the rows.
    """
    rows = pairs(where, **axes)
    return pytest.mark.parametrize(
        ','.join(axes),
        [
            pytest.param(
                *row.values(),
                id='-'.join(filter(None, _names(row, axes))) or 'plain',
            )
            for row in rows
        ],
    )


def _names(row, axes):
    for axis, value in row.items():
        if isinstance(axes[axis], Mapping):
            (name,) = (k for k, v in axes[axis].items() if v is value)
            yield name
        elif isinstance(value, bool):
            yield axis if value else ''
        elif isinstance(value, torch.dtype):
            yield str(value).removeprefix('torch.')
        elif isinstance(value, tuple):
            yield 'x'.join(map(str, value)) or 'scalar'
        elif isinstance(value, str):
            yield value
        else:
            yield f'{axis}={value}'


@contextlib.contextmanager
def case(*parts, **named):
    """Name one turn of a loop in what its failure says.

    Args:
        *parts: Values that tell the turn from the others.
        **named: The same, with their names.

    Raises:
        AssertionError: From whatever was raised inside.
    """
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        parts = [*map(str, parts), *(f'{k}={v}' for k, v in named.items())]
        raise AssertionError(f'in the case {", ".join(parts)}') from error


def in_turn(rows=None, /, *, unless=None, where=None, by=None, **axes):
    """Decorator that runs a test with each of some rows, all in one test.

    For what is too cheap to be a test of its own. Random numbers start anew
    in each turn, and a failure names its row.

    Args:
        rows (list[dict] | dict[str, dict], optional): Arguments of each turn,
            by their name if that is not to be made of them. Defaults to the
            :func:`pairs` of the axes.
        unless (callable, optional): Takes the arguments, those of other
            decorators and fixtures among them, and says which turns to leave
            out. Defaults to none.
        where (callable, optional): As of :func:`pairs`.
        by (str, optional): One of the axes, each value of which has a test
            of its own. Defaults to one test for all rows.
        **axes: As of :func:`pairs`.

    Returns:
        callable: The decorator.
    """
    rows = rows or pairs(where, **axes)
    if by is None:
        return _in_turn({None: rows}, unless, ())
    groups = {}
    for row in rows:
        (name,) = _names({by: row[by]}, axes)
        groups.setdefault(name, []).append(row)
    return in_turn_by_group(groups, unless)


def in_turn_by_group(groups, unless=None):
    """As :func:`in_turn`, with one test for each group of rows.

    Args:
        groups (dict[str, list[dict] | dict[str, dict]]): Rows by the name of
            their group.
        unless (callable, optional): As of :func:`in_turn`.

    Returns:
        callable: The decorator.
    """
    return _in_turn(groups, unless, ('group',))


def _in_turn(groups, unless, extra):
    def decorate(test):
        @functools.wraps(test)
        def run(*args, group=None, **kwargs):
            rows = groups[group]
            if not isinstance(rows, Mapping):
                rows = {_describe(row): row for row in rows}
            for name, row in rows.items():
                if unless is not None and unless(**row, **kwargs):
                    continue
                torch.manual_seed(0)
                with case(name):
                    test(*args, **row, **kwargs)

        # Arguments that pytest has to supply.
        signature = inspect.signature(test)
        rows = next(iter(groups.values()))
        own = next(iter(rows.values() if isinstance(rows, Mapping) else rows))
        rest = [p for p in signature.parameters.values() if p.name not in own]
        rest += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
            for name in extra
        ]
        run.__signature__ = signature.replace(parameters=rest)
        if extra:
            return pytest.mark.parametrize('group', groups)(run)
        return run

    return decorate


def _describe(row):
    return ', '.join(f'{name}={value}' for name, value in row.items())
