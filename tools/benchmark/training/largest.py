"""Search for the largest size that trains."""

import dataclasses

from shared.results import FINISHED, OK, OUT_OF_MEMORY

from .models import scale_resnet

# Smallest size that is tried of each quantity.
QUANTITIES = {'batch': 1, 'image-size': 32, 'depth': 50, 'width': 1}


def find_largest(trial, quantity, resolution, measure):
    """Search for the largest size that trains.

    Args:
        trial (Trial): Settings at another size.
        quantity (str): One of ``QUANTITIES``.
        resolution (int): Sizes are multiples of it.
        measure (Callable): Returns the row of a trial.

    Returns:
        dict: The size as ``largest``, None if not even the smallest trains,
        and the row of that size. If a measurement fails by anything but
        memory, the search ends with that ``result``.
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

    Doubles the smallest one that is no less than the minimum until it does
    not fit, then bisects: what is less than one that fits is taken to fit.
    """
    fitting = -(-minimum // step)
    if not fits(fitting * step):
        return None
    failing = 2 * fitting
    while fits(failing * step):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(middle * step):
            fitting = middle
        else:
            failing = middle
    return fitting * step


class _Failed(Exception):
    """A measurement failed, and not for want of memory."""


def _resize(trial, quantity, size):
    if quantity == 'batch':
        return dataclasses.replace(trial, batch_size=size)
    if quantity == 'image-size':
        return dataclasses.replace(trial, image_size=(size, size))
    model = scale_resnet(trial.model, **{quantity: size})
    return dataclasses.replace(trial, model=model)
