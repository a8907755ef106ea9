"""Location of a running computation in a model and in its source."""

import linecache
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..modules.naming import named_modules

# Packages whose lines are part of a layer, not of the model.
_LIBRARIES = {'torch', 'mmactnn'}

# Names of Python modules with losses, or their last word (`focal_loss`).
_LOSSES = {'loss', 'losses'}

# Parts of the names of torch's functional losses.
_FUNCTIONAL_LOSSES = ('loss', 'cross_entropy', 'kl_div')

# Functions through which torch runs a module's forward pass.
_CALLS = {'__call__', '_call_impl', '_wrapped_call_impl'}


class Source(NamedTuple):
    """A line of source code.

    Attributes:
        module (str): Dotted name of the Python module.
        file (str): Its path.
        line (int): Number of the line.
    """

    module: str
    file: str
    line: int

    def __str__(self):
        return f'{Path(self.file).name}:{self.line}'

    @property
    def text(self):
        """str: The text of the line."""
        return linecache.getline(self.file, self.line).strip()


class Place(NamedTuple):
    """Location of a computation.

    Attributes:
        module (str, optional): Qualified name of the innermost running module
            of the model, ``''`` for the model itself; None if no module is
            running.
        source (Source, optional): Line that calls into torch; None if the
            module is a layer of torch or of this package.
        loss (bool): Whether the computation belongs to the losses.
    """

    module: str | None
    source: Source | None
    loss: bool


class Locator:
    """Locates the calling code in a model.

    It reads the call stack: the model needs no hooks, and methods other than
    ``forward`` are recognised.

    A computation belongs to the losses if one of these is found, from the
    innermost call outwards:

    1. code of a Python module or package called ``loss``, ``losses`` or
       ``*_loss`` (``mmdet.models.losses``, ``torch.nn.modules.loss``), modules
       of a class from there, and the losses of ``torch.nn.functional``;
    2. a method of a module of the model with ``loss`` in its name
       (``loss_by_feat``), other than the ``loss`` of the model itself, which
       runs all of it;
    3. code outside of all modules of the model, once these have returned
       their outputs.

    A module's forward pass ends the search: computations in a head's
    ``forward`` are no loss, even if its ``loss`` called it.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model):
        self._names = {m: name for name, m in named_modules(model)}

    def __call__(self):
        """Locate the caller.

        Returns:
            Place: The place.
        """
        name = source = loss = None
        frame = sys._getframe(1)
        while frame is not None and (name is None or loss is None):
            module = _running_module(frame)
            owner = self._names.get(module)
            if name is None:
                source = source or _source(frame)
                name = owner
            if loss is None:
                loss = _is_loss(frame, owner, module)
            frame = frame.f_back
        if name is None:
            return Place(None, source, True)
        return Place(name, source, bool(loss))


def _running_module(frame):
    """The module that a frame runs a method of, or None."""
    code = frame.f_code
    if not code.co_argcount or code.co_varnames[0] != 'self':
        return None
    variables = frame.f_locals
    owner = variables.get('self')
    if isinstance(variables, dict):
        # Before Python 3.13 the frame keeps this copy of its variables, and
        # with it tensors that its function has already dropped.
        variables.clear()
    return owner if isinstance(owner, nn.Module) else None


def _source(frame):
    """Current line of a frame, or None in a library."""
    name = frame.f_globals.get('__name__', '')
    if name.partition('.')[0] in _LIBRARIES:
        return None
    return Source(name, frame.f_code.co_filename, frame.f_lineno)


def _is_loss(frame, owner, module):
    """Whether a frame computes a loss; None if those around it decide."""
    name, method = frame.f_globals.get('__name__', ''), frame.f_code.co_name
    if _of_losses(name) or (
        name == 'torch.nn.functional'
        and any(word in method for word in _FUNCTIONAL_LOSSES)
    ):
        return True
    if owner is None:
        return None
    if _of_losses(type(module).__module__):
        return True
    if method in _CALLS or 'forward' in method:
        return False
    if 'loss' in method and (owner, method) != ('', 'loss'):
        return True
    return None


def _of_losses(name):
    """Whether a Python module computes losses, by its name."""
    return any(p.rpartition('_')[2] in _LOSSES for p in name.split('.'))
