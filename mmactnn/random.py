"""Random bits for rounding, apart from torch's own streams."""

import torch

_MASK64 = (1 << 64) - 1


def _mix(value):
    """Spread an integer over 64 bits (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def refuse_capture():
    """Raise where a CUDA graph would hold on to random bits.

    Raises:
        RuntimeError: If a graph is being captured.
    """
    if torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing()
    ):
        raise RuntimeError(
            'compressed layers cannot be captured in a CUDA graph: every '
            'replay would round, and drop, with the same random bits, and '
            'errors would add up instead of averaging out. Capture the model '
            'at level L0, or train it without a graph'
        )


class RoundingGenerator:
    """Numbers the tensors that are rounded, so that no two round alike.

    The random bits themselves are made in the kernels by a counter-based
    generator from ``(seed, offset)``; this object hands out the pairs. It
    never draws from torch's generators, so that training with and without
    compression sees the same initial weights and the same order of data.

    A generator without a seed of its own follows ``torch.manual_seed``: it
    takes ``torch.initial_seed()`` and starts anew whenever that changes.

    Args:
        seed (int, optional): Seed. Defaults to torch's initial seed.
        stream (int, optional): Which of many independent sequences of the
            seed, such as the rank of a process. Defaults to 0.

    Examples:
        >>> generator = RoundingGenerator(seed=1)
        >>> key, offset = generator.next()
    """

    def __init__(self, seed=None, stream=0):
        self._seed = seed
        self._stream = stream
        self._followed = None
        self._offset = 0
        self._key = None if seed is None else self._make_key(seed)

    @property
    def seed(self):
        """int: The seed in force."""
        return torch.initial_seed() if self._seed is None else self._seed

    def manual_seed(self, seed, stream=0):
        """Start anew from a seed.

        Args:
            seed (int, optional): Seed; None follows ``torch.manual_seed``.
            stream (int, optional): See the class. Defaults to 0.
        """
        self.__init__(seed, stream)

    def seek(self, offset):
        """Jump to a place of the sequence.

        Args:
            offset (int): 64-bit count of tensors. A runner that jumps to
                ``iteration << 32`` before each iteration needs no other
                state to resume.
        """
        self._follow()
        self._offset = offset

    def next(self):
        """The pair for one more tensor.

        Returns:
            tuple[int, int]: Key and offset, 64 bits each.

        Raises:
            RuntimeError: If a CUDA graph is being captured: it would hold on
                to the pair, and every replay would round alike.
        """
        refuse_capture()
        self._follow()
        offset = self._offset
        self._offset = (offset + 1) & _MASK64
        return self._key, offset

    def state_dict(self):
        """dict: What :meth:`load_state_dict` needs to go on from here."""
        self._follow()
        return dict(seed=self.seed, stream=self._stream, offset=self._offset)

    def load_state_dict(self, state):
        """Go on from a saved state.

        Args:
            state (dict): From :meth:`state_dict`.
        """
        self.manual_seed(state['seed'], state['stream'])
        self._offset = state['offset']

    def _follow(self):
        if self._seed is None and self._followed != torch.initial_seed():
            self._followed = torch.initial_seed()
            self._offset = 0
            self._key = self._make_key(self._followed)

    def _make_key(self, seed):
        return _mix(_mix(seed) ^ self._stream)


# Layers that no conversion has given a generator of their model's share this
# one, as torch's random functions share ``torch.default_generator``.
default_generator = RoundingGenerator()


def manual_seed(seed):
    """Seed the rounding of layers that belong to no converted model.

    Without this call they follow ``torch.manual_seed``, which cannot be told
    apart from no call when it repeats the seed in force.

    Args:
        seed (int): Seed.
    """
    default_generator.manual_seed(seed)
