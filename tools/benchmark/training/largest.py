"""Search for the largest size that trains."""

import bisect
import dataclasses

from shared.results import FINISHED, OK, OUT_OF_MEMORY

from .models import scale_resnet

# Smallest size to try, by quantity.
QUANTITIES = {'batch': 1, 'image-size': 32, 'depth': 50, 'width': 1}


def find_largest(trial, quantity, resolution, measure):
    """Search for the largest multiple of a resolution that trains.

    Returns:
        dict: The size as ``largest``, None if not even the smallest trains,
        and its row by ``measure(trial)``. A failure by anything but memory
        ends the search.
    """
    rows = {}

    def fits(size):
        row = rows[size] = measure(_resize(trial, quantity, size))
        if row['result'] not in FINISHED:
            raise _Failed(row)
        return row['result'] == OK

    try:
        largest = search_largest(fits, QUANTITIES[quantity], resolution)
        row = rows.get(largest, dict(result=OUT_OF_MEMORY))
    except _Failed as failure:
        largest, row = None, failure.args[0]
    settings = dict(model=trial.model, quantity=quantity, largest=largest)
    return {**dataclasses.asdict(trial), **row, **settings}


def search_largest(fits, minimum, step):
    """Largest multiple of a step that fits, or None.

    Doubles the smallest that is no less than the minimum, then bisects.
    """
    high = low = -(-minimum // step)
    while fits(high * step):
        low, high = high, 2 * high
    if low == high:
        return None
    between = range(low + 1, high)
    low += bisect.bisect(between, False, key=lambda n: not fits(n * step))
    return low * step


class _Failed(Exception):
    """A measurement failed for another reason than memory."""


def _resize(trial, quantity, size):
    if quantity == 'batch':
        changes = dict(batch_size=size)
    elif quantity == 'image-size':
        changes = dict(image_size=(size, size))
    else:
        changes = dict(model=scale_resnet(trial.model, **{quantity: size}))
    return dataclasses.replace(trial, **changes)
