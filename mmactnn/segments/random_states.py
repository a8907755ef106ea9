"""States of torch's generator of a GPU for segments in a CUDA graph."""

import contextlib
import contextvars

import torch

from ..random import mix64

_in_force = contextvars.ContextVar('random states of segments', default=None)


def random_states():
    """Random states that segments take now.

    Returns:
        RandomStates, optional: None unless a graph is being captured.
    """
    return _in_force.get()


class RandomState:
    """State of the generator for both forward passes of a segment.

    Passes of a graph cannot set a generator back, since each graph counts on
    by itself. Two states that begin alike and count alike draw alike.

    Args:
        generator (torch.Generator): Generator of the GPU.
        seed (int): Seed of both states.
    """

    def __init__(self, generator, seed):
        self._generator = generator
        self.first = generator.clone_state().manual_seed(seed)
        self.again = generator.clone_state().manual_seed(seed)

    @contextlib.contextmanager
    def drawing(self, state):
        """Draw from a state, as a context.

        Args:
            state (torch.Generator): ``first`` or ``again``.
        """
        generator = self._generator
        before = generator.graphsafe_get_state()
        generator.graphsafe_set_state(state)
        try:
            yield
        finally:
            generator.graphsafe_set_state(before)


class RandomStates:
    """Random states of the segments in one captured call.

    Args:
        device (torch.device): The GPU.
        count (int): Calls of segments at most.
    """

    def __init__(self, device, count):
        index = device.index
        if index is None:
            index = torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        # Another capture has other states.
        base = mix64(generator.initial_seed()) ^ generator.get_offset()
        self.states = [
            # Seeds are signed in torch.
            RandomState(generator, mix64(base + i) >> 1)
            for i in range(count)
        ]
        self._left = iter(self.states)

    @contextlib.contextmanager
    def in_force(self):
        """Hand out the states to segments, as a context."""
        token = _in_force.set(self)
        try:
            yield
        finally:
            _in_force.reset(token)

    def take(self):
        """Take the state of the next segment.

        Returns:
            RandomState: The state.

        Raises:
            RuntimeError: If there are more calls of segments than expected.
        """
        state = next(self._left, None)
        if state is None:
            raise RuntimeError(
                f'more than {len(self.states)} calls of segments in a CUDA '
                'graph'
            )
        return state
