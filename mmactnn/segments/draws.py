"""Random numbers of samples, drawn at once for pieces of a batch."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = frozenset((torch.rand, torch.randn))
_FILLS = frozenset((torch.Tensor.bernoulli_, torch.Tensor.uniform_))


class Draws:
    """Random numbers of one call, such as those of stochastic depth.

    They are those that the function would have drawn for the whole batch.

    Args:
        batch (int): Samples of the batch.
        kinds (Sequence[bool], optional): For each draw, whether it has
            numbers for each sample. Defaults to none known: to be found by a
            pass over the whole batch.
    """

    def __init__(self, batch, kinds=None):
        self.batch = batch
        self.kinds = kinds
        self._drawn = []

    @property
    def size(self):
        """int: Elements that were drawn."""
        return sum(values.numel() for _, values in self._drawn)

    def find_kinds(self):
        """Set the kinds by draws for the whole batch."""
        self.kinds = tuple(
            values.dim() > 0 and len(values) == self.batch
            for _, values in self._drawn
        )

    def draw_again(self):
        """Draw the same numbers again, where random states are the same."""
        for draw, values in self._drawn:
            draw(tuple(values.shape))

    def passing(self, start, stop):
        """Context of a pass over a piece of the batch.

        Args:
            start (int): First sample.
            stop (int): One past the last sample.

        Returns:
            TorchFunctionMode: The context.
        """
        return _Pass(self, start, stop)

    def take(self, index, draw, shape, start, stop):
        """Numbers of a piece.

        Args:
            index (int): Number of the draw in its pass.
            draw (Callable): Makes numbers of a shape.
            shape (tuple[int]): Shape that the pass asks for.
            start (int): First sample of the piece.
            stop (int): One past the last one.

        Returns:
            Tensor[*]: The numbers, which the caller may write to.

        Raises:
            RuntimeError: If the pass draws others than the one before.
        """
        by_sample = False
        if self.kinds is not None:
            by_sample = index < len(self.kinds) and self.kinds[index]
        whole = (self.batch, *shape[1:]) if by_sample else shape
        if index == len(self._drawn):
            self._drawn.append((draw, draw(whole)))
        values = self._drawn[index][1]
        found = values[start:stop] if by_sample else values
        if found.shape != torch.Size(shape):
            raise RuntimeError(
                'a segment draws other random numbers for a piece of the '
                f'batch than for all of it: of shape {shape} in place of '
                f'{tuple(found.shape)}'
            )
        return found.clone()


class _Pass(TorchFunctionMode):
    def __init__(self, draws, start, stop):
        super().__init__()
        self._draws = draws
        self._place = start, stop
        self._count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _FACTORIES and args:
            sizes = args if isinstance(args[0], int) else args[0]

            def draw(shape):
                return function(shape, **kwargs)

            return self._take(draw, tuple(sizes))
        if function in _FILLS:
            target, *others = args
            make = target.detach().new_empty

            def draw(shape):
                return function(make(shape), *others, **kwargs)

            with torch.no_grad():
                values = self._take(draw, tuple(target.shape))
            return target.copy_(values)
        return function(*args, **kwargs)

    def _take(self, draw, shape):
        index, self._count = self._count, self._count + 1
        return self._draws.take(index, draw, shape, *self._place)


@contextlib.contextmanager
def states_kept(device):
    """Give random states back at the end, as a context.

    Args:
        device (torch.device): Device whose numbers are drawn.
    """
    devices = [] if device.type == 'cpu' else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        yield


def states_of(device):
    """Random states of the host and a device.

    Args:
        device (torch.device): The device.

    Returns:
        list[Tensor[bytes]]: uint8.
    """
    states = [torch.get_rng_state()]
    if device.type != 'cpu':
        module = torch.get_device_module(device)
        states.append(module.get_rng_state(device))
    return states
