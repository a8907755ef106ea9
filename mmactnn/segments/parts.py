"""Blocks that are too large to live at once: in pieces, and in branches."""

from typing import NamedTuple

import torch

from ..modules.execution import is_ordinary, is_transformed
from ..modules.function_mode import call_outside
from .branches import Branches, run_branches
from .pieces import Pieces
from .random_states import random_states

# Most bytes that layers of a segment should keep while it runs again. Smaller
# pieces would lower the peak of few models, as other parts of a model take as
# much, and keep the host busier.
MAX_BYTES = 768 * 2**20


class BlockSize(NamedTuple):
    """Size of a block while it runs again, in place of its bytes.

    Attributes:
        width (int): Channels of its input.
        channels (dict[str, float]): Channels that the layers within a part of
            it keep, by the part's name; that of the block is ``''``.
    """

    width: int
    channels: dict


class BlockParts:
    """Division of one block into the parts that live one by one.

    A block whose layers keep too much while it runs again runs in pieces of
    the batch, which needs no more codes. If a single sample is too large, it
    also runs branch by branch.

    Args:
        size (BlockSize): Its size.
    """

    def __init__(self, size):
        self._size = size
        self._branches = Branches(size.channels)
        self._pieces = Pieces()

    def __deepcopy__(self, memo):
        return BlockParts(self._size)

    def __reduce__(self):
        return BlockParts, (self._size,)

    def run(self, module, cls, function, args, kwargs, run):
        """Run a block, as one segment or as several.

        Args:
            module (nn.Module): The block, in training mode.
            cls (type): Its class before it was a segment.
            function (Callable): Its forward pass.
            args (tuple): Arguments of the call.
            kwargs (dict): Keyword arguments of the call.
            run (Callable): Runs a function with arguments and keyword
                arguments as a segment.

        Returns:
            object: Result of the forward pass.
        """
        size = self._bytes(args)
        if (
            size <= MAX_BYTES
            # A captured graph has one random state for each block.
            or random_states() is not None
            or torch.compiler.is_compiling()
            or is_transformed()
        ):
            return run(function, args, kwargs)
        modules = list(module.modules())
        count = int(-(-size // MAX_BYTES))

        def run_pieces(key, function, args, kwargs):
            return call_outside(
                self._pieces.run,
                *(key, function, args, kwargs, count, modules, run),
            )

        if size > MAX_BYTES * len(args[0]):
            found = self._branches.find(module, cls, args, kwargs)
            if found is not None:
                del args, kwargs
                return run_branches(module, *found, run_pieces)
        return run_pieces(None, function, args, kwargs)

    def _bytes(self, args):
        """Bytes that the layers keep, by the size of the first argument."""
        if not args or not is_ordinary(args[0]) or not self._size.width:
            return 0
        ratio = self._size.channels[''] / self._size.width
        return args[0].numel() * args[0].element_size() * ratio
