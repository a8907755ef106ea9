"""Where in the code tensors are saved for a backward pass."""

import collections
import contextlib
import sys
from pathlib import PurePath

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# What belongs to the loss: whole functions of MMDetection's heads, and all
# files in folders of this name.
_LOSS_FUNCTIONS = ('loss_by_feat', 'loss_and_target')
_LOSS_FOLDER = 'losses'


class SavedPlaces:
    """Bytes of storages that autograd saves, by what saves them.

    A storage counts once, where it is saved first; parameters and buffers do
    not count.

    Args:
        model (nn.Module): The model that runs.

    Attributes:
        layers (int): Bytes of what compressed layers keep.
        losses (int): Bytes that losses save.
        others (collections.Counter): Bytes that all else saves, by file,
            line and function.
    """

    def __init__(self, model):
        self.layers = self.losses = 0
        self.others = collections.Counter()
        self._own = {
            t.untyped_storage()._cdata
            for t in (*model.parameters(), *model.buffers())
        }
        self._seen = {}

    @property
    def others_bytes(self):
        """int: Bytes that neither layers nor losses save."""
        return sum(self.others.values())

    def pack(self, tensor):
        """Hook for every tensor that autograd saves."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._own and key not in self._seen:
            # A weak reference: the key is not given to another storage.
            self._seen[key] = StorageWeakRef(storage)
            self._count(storage.nbytes())
        return tensor.detach()

    def _count(self, nbytes):
        place, frame = None, sys._getframe(2)
        while frame is not None:
            path = PurePath(frame.f_code.co_filename)
            name = frame.f_code.co_name
            if 'mmactnn' in path.parts and 'autograd' in path.parts:
                self.layers += nbytes
                return
            if name.startswith(_LOSS_FUNCTIONS) or _LOSS_FOLDER in path.parts:
                self.losses += nbytes
                return
            if place is None and 'support' not in path.parts:
                place = f'{path.name}:{frame.f_lineno} {name}'
            frame = frame.f_back
        self.others[place] += nbytes


@contextlib.contextmanager
def saved_places(model):
    """Watch what the code inside of the block saves.

    Args:
        model (nn.Module): The model that runs there.

    Yields:
        SavedPlaces: Counts up as the model runs.
    """
    places = SavedPlaces(model)
    with torch.autograd.graph.saved_tensors_hooks(
        places.pack, lambda tensor: tensor
    ):
        yield places
