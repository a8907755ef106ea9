"""Large segments that run for a few samples at a time.

While a segment runs again, all that it computes lives, for a piece of the
batch if its samples do not depend on one another. Whether they do is measured
once: the first and the last sample alone must have the results that they have
in the batch.
"""

import contextlib
import functools

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..fusion.eligibility import has_hooks
from ..modules.execution import is_ordinary
from ..ops.capture import is_capturing
from .buffers import buffers_copied
from .draws import Draws, states_kept, states_of

# Largest relative difference of results that rounding explains, where
# matrices of other sizes are added up in another order: of float32, whose
# products may have less precision, and of 16-bit numbers.
_TOLERANCE = 1e-3
_TOLERANCE_16 = 2e-2
# Most elements of random numbers that pieces share, for one of the input.
_MAX_DRAWN = 1 / 16


class Pieces:
    """Segments of one block, which run in pieces of the batch.

    Attributes:
        kinds (dict[object, tuple | None]): For each segment whose samples
            were found not to depend on one another the kinds of its random
            draws, see :class:`.draws.Draws`; None for others.
    """

    def __init__(self):
        self.kinds = {}

    def run(self, key, function, args, kwargs, count, modules, run):
        """Run a segment in pieces if its samples allow that.

        Args:
            key (object): Name of the segment in the block.
            function (Callable): Function of the segment.
            args (tuple): Its arguments.
            kwargs (dict): Its keyword arguments.
            count (int): Number of pieces.
            modules (Sequence[nn.Module]): Modules that it calls, the block
                first.
            run (Callable): Runs a function with arguments and keyword
                arguments as a segment.

        Returns:
            object: Result of the function.
        """
        count = min(count, _batch_of(args))
        # Hooks see whole batches.
        if count < 2 or any(map(has_hooks, modules[1:])):
            return run(function, args, kwargs)
        # Measuring waits for the device, which a captured graph cannot.
        if key not in self.kinds and not is_capturing():
            with torch.no_grad(), _casts_not_cached():
                self.kinds[key] = _find_kinds(function, args, kwargs, modules)
        kinds = self.kinds.get(key)
        if kinds is None:
            return run(function, args, kwargs)
        batch = len(args[0])
        size = -(-batch // count)
        draws = Draws(batch, kinds)
        parts = [
            value.split(size)
            if _has_samples(value, batch)
            else [value] * -(-batch // size)
            for value in args
        ]
        results = []
        for i, part in enumerate(zip(*parts)):
            start = i * size
            stop = min(start + size, batch)
            piece = functools.partial(_run_piece, draws, start, stop, function)
            results.append(run(piece, part, kwargs))
        return torch.cat(results)


@contextlib.contextmanager
def _casts_not_cached():
    """Context in which autocast does not keep weights without gradients."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _run_piece(draws, start, stop, function, *args, **kwargs):
    with draws.passing(start, stop):
        return function(*args, **kwargs)


def _batch_of(args):
    """Samples of the first argument; 1 if it is no tensor of samples."""
    first = args[0] if args else None
    return len(first) if is_ordinary(first) and first.dim() > 1 else 1


def _has_samples(value, batch):
    return is_ordinary(value) and value.dim() > 0 and len(value) == batch


def _find_kinds(function, args, kwargs, modules):
    """Kinds of the draws of a segment; None if it needs whole batches."""
    first = args[0]
    batch, device = len(first), first.device
    if any(isinstance(m, _BatchNorm) and m.training for m in modules):
        return None
    draws = Draws(batch)
    # The segment may write to its input.
    copy = first.detach().clone()
    with buffers_copied(modules) as copies, states_kept(device):
        before = states_of(device)
        whole = _run_piece(
            draws, 0, batch, function, copy, *args[1:], **kwargs
        )
        if (
            not _has_samples(whole, batch)
            or copy._version
            or any(buffer._version for buffer in copies)
            or draws.size > _MAX_DRAWN * first.numel()
        ):
            return None
        after = states_of(device)
        _set_states(before, device)
        draws.draw_again()
        if not all(map(torch.equal, after, states_of(device))):
            # Random numbers of others, such as dropout.
            return None
        draws.find_kinds()
        # The first sample and the last one: results may depend on the
        # samples before, or on those behind.
        same = all(
            _is_same(draws, start, function, (copy, *args[1:]), kwargs, whole)
            for start in (0, batch - 1)
        )
    return draws.kinds if same else None


def _is_same(draws, start, function, args, kwargs, whole):
    """Whether a sample alone has the result that it has in the batch."""
    alone = [
        value[start : start + 1] if _has_samples(value, len(whole)) else value
        for value in args
    ]
    try:
        found = _run_piece(draws, start, start + 1, function, *alone, **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError):
        # Such as a view that names the batch's size.
        return False
    expected = whole[start : start + 1]
    return (
        is_ordinary(found)
        and found.shape == expected.shape
        and _are_close(found, expected)
    )


def _are_close(found, expected):
    tolerance = _TOLERANCE
    if found.dtype.itemsize < 4 or torch.is_autocast_enabled(
        found.device.type
    ):
        tolerance = _TOLERANCE_16
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= tolerance * expected.float().norm())


def _set_states(states, device):
    torch.set_rng_state(states[0])
    if device.type != 'cpu':
        module = torch.get_device_module(device)
        module.set_rng_state(states[1], device)
