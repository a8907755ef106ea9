"""Recording of work on a GPU as CUDA graphs."""

import torch

from ..segments import RandomStates


class Recorder:
    """Records CUDA graphs that share one pool of memory.

    Graphs of one recorder must not be replayed between the forward and the
    backward graph of another call: memory of one is used by the others.

    Args:
        device (torch.device): The GPU.

    Attributes:
        pool_bytes (int): Memory that the pool has taken from the GPU.
    """

    def __init__(self, device):
        self.pool_bytes = 0
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Nodes of a backward pass run on the stream of their forward pass.
        self._stream = torch.cuda.Stream(device)

    def record(self, function, generators=()):
        """Record a function that takes nothing.

        Args:
            function (Callable): The function.
            generators (Iterable[torch.Generator], optional): Random states
                that the function draws from, beside the one in force.

        Returns:
            tuple[Callable, object]: Function that replays the graph on the
            current stream, and the result, whose tensors replays write to.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device):
            # As the context does, so that the difference is the pool's.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            # Other threads, such as those that pin memory for data loaders,
            # go on with their work.
            with torch.cuda.graph(
                graph, self._pool, self._stream, 'thread_local'
            ):
                result = function()
            self.pool_bytes += torch.cuda.memory_reserved() - before
        return graph.replay, result

    def random_states(self, count):
        """Make random states for segments.

        Args:
            count (int): Calls of segments at most.

        Returns:
            RandomStates: The states.
        """
        return RandomStates(self._device, count)
