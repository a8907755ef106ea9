"""Random bits for rounding, independent of torch's generators."""

import operator
from typing import NamedTuple

import torch

# The odd number next to 2^64 over the golden ratio.
GOLDEN64 = 0x9E3779B97F4A7C15

_MASK64 = (1 << 64) - 1


def mix64(value):
    """Finaliser of SplitMix64: spreads a number over 64 bits.

    G. L. Steele et al., "Fast splittable pseudorandom number generators",
    OOPSLA'14, Sec. 3.

    Args:
        value (int): Its 64 lowest bits count.

    Returns:
        int: 64 bits, different ones for different numbers.
    """
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix(value):
    """Spread an integer over 64 bits (one step of SplitMix64)."""
    return mix64(value + GOLDEN64)


class Draw(NamedTuple):
    """Key and counter of the random bits for one tensor.

    Attributes:
        seed (int): Key, 64 bits.
        offset (int): Counter, 64 bits.
        offset_tensor (Tensor[1], optional): int64, on the device of the
            tensor; kernels add it to ``offset``. None is 0. It belongs to
            this draw, and keeps its value until a graph is replayed.
    """

    seed: int
    offset: int
    offset_tensor: torch.Tensor | None = None


class RoundingGenerator:
    """Generator of seeds and offsets, different for every rounded tensor.

    The random bits themselves are made in the kernels by a counter-based
    generator from ``(seed, offset)``; this object hands out the pairs. It
    never draws from torch's generators, so that training with and without
    compression sees the same initial weights and the same order of data.

    A generator without a seed of its own has the seed of
    :data:`default_generator` and starts anew whenever that is seeded by
    :func:`manual_seed`. As long as it is not, that is
    ``torch.initial_seed()``; all start anew when it changes.

    A CUDA graph repeats the numbers that it was captured with. A draw for a
    graph therefore has a key of its own and a counter on the device, which
    the graph itself increments: each replay rounds anew. The counters belong
    to this object and to this process; they are not part of copies and saved
    states, and are not reset by a seed.

    Args:
        seed (int, optional): Seed. Defaults to that of the default generator.
        stream (int, optional): Which of many independent sequences of the
            seed, such as the rank of a process. Defaults to 0.

    Examples:
        >>> generator = RoundingGenerator(seed=1)
        >>> seed, offset, offset_tensor = generator.next(torch.device('cpu'))
    """

    def __init__(self, seed=None, stream=0):
        # By device. Graphs hold their addresses.
        self._counters = {}
        # So that a seed that is set once more is noticed.
        self._times_seeded = 0
        self.manual_seed(seed, stream)

    @property
    def seed(self):
        """int: The seed in force."""
        if self._seed is not None:
            return self._seed
        if self is default_generator:
            return torch.initial_seed()
        return default_generator.seed

    def manual_seed(self, seed, stream=0):
        """Start anew from a seed.

        Args:
            seed (int, optional): Seed; None follows the default generator,
                and in this one ``torch.manual_seed``.
            stream (int, optional): See the class. Defaults to 0.

        Raises:
            TypeError: If the seed is no integer.
        """
        if seed is not None:
            try:
                seed = operator.index(seed)
            except TypeError:
                raise TypeError(
                    f'seed must be an int or None, got {seed!r}'
                ) from None
        self._times_seeded += 1
        self._seed = seed
        self._stream = stream
        self._followed = None
        self._offset = 0
        self._key = None if seed is None else self._make_key(seed)

    def seek(self, offset):
        """Jump to a place of the sequence.

        Args:
            offset (int): 64-bit count of tensors. A runner that jumps to
                ``iteration << 32`` before each iteration needs no other
                state to resume.
        """
        self._follow()
        self._offset = offset

    def next(self, device, tensors=1):
        """Draw key and counter for the next tensor.

        Args:
            device (torch.device): Device of the tensor.
            tensors (int, optional): Number of tensors to draw for; the i-th
                takes ``offset + i``. One while a graph is captured. Defaults
                to 1.

        Returns:
            Draw: Seed, offset and offset tensor.

        Raises:
            RuntimeError: If a CUDA graph is being captured, and nothing was
                drawn for the device before.
        """
        if self._seed is None:
            # As _follow() would, without its calls.
            seed = default_generator._seed
            if seed is None:
                seed = torch.initial_seed()
            if self._followed != (seed, default_generator._times_seeded):
                self._follow()
        offset = self._offset
        self._offset = (offset + tensors) & _MASK64
        if device.type == 'cuda':
            counter = self._counters.get(device)
            if torch.cuda.is_current_stream_capturing():
                return self._draw_captured(offset, counter)
            if counter is None:
                self.prepare(device)
        return Draw(self._key, offset)

    def prepare(self, device):
        """Make the counter of a device that captured graphs will need.

        The first draw does so, too, unless it is captured itself.

        Args:
            device (torch.device): Any; only those with CUDA have counters.
        """
        if device.type != 'cuda' or device in self._counters:
            return
        # Outside of inference mode: captured steps write to it.
        with torch.inference_mode(False):
            self._counters[device] = torch.zeros(
                1, dtype=torch.int64, device=device
            )

    def state_dict(self):
        """State with which :meth:`load_state_dict` resumes.

        Returns:
            dict: Seed, stream and offset.
        """
        self._follow()
        return dict(seed=self.seed, stream=self._stream, offset=self._offset)

    def load_state_dict(self, state):
        """Resume from a saved state.

        Args:
            state (dict): From :meth:`state_dict`.
        """
        self.manual_seed(state['seed'], state['stream'])
        self._offset = state['offset']

    def _follow(self):
        if self._seed is not None:
            return
        seed = default_generator.seed
        followed = seed, default_generator._times_seeded
        if self._followed != followed:
            self._followed = followed
            self._offset = 0
            self._key = self._make_key(seed)

    def _draw_captured(self, offset, counter):
        if counter is None:
            raise RuntimeError(
                'a compressed layer is captured in a CUDA graph before it has '
                'run on this device. Run some training steps on a side stream '
                'first, as torch.cuda.graph wants it'
            )
        counter.add_(1)
        # A key for each draw: layers that are captured on several streams
        # may find the counter at one place.
        # A copy: decoders need the value after later draws, too.
        return Draw(_mix(self._key ^ _mix(offset)), 0, counter.clone())

    def __getstate__(self):
        """For copies and pickle: without the counters of captured graphs."""
        return {**self.__dict__, '_counters': {}}

    def _make_key(self, seed):
        return _mix(_mix(seed) ^ self._stream)


# Layers that no conversion has given a generator of their model's share this
# one, as torch's random functions share ``torch.default_generator``; and the
# generators of models have its seed unless they have one of their own.
default_generator = RoundingGenerator()


def manual_seed(seed):
    """Seed the rounding of all layers, those of converted models included.

    What is rounded after two calls with one seed is rounded alike. Without
    this call rounding follows ``torch.manual_seed``, which cannot be told
    apart from no call when it repeats the seed in force. A generator that was
    given a seed (:class:`RoundingGenerator`), such as that of
    :class:`mmactnn.hooks.ActNNHook`, keeps it.

    Args:
        seed (int, optional): Seed; None follows ``torch.manual_seed`` again.

    Raises:
        TypeError: If the seed is no integer.
    """
    default_generator.manual_seed(seed)
