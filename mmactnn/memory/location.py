"""Where in a model, and where in its source, something is being computed."""

import linecache
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..modules.naming import named_modules

# Calls inside of these are a layer's own doing, not a line of the model's.
_LIBRARIES = {'torch', 'mmactnn'}

# How packages call the modules where their losses are, perhaps after what
# they are losses of (`focal_loss`).
_LOSSES = {'loss', 'losses'}

# What is in the names of torch's functional losses.
_FUNCTIONAL_LOSSES = ('loss', 'cross_entropy', 'kl_div')

# What torch runs a module's forward pass through.
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
        """str: What is written there."""
        return linecache.getline(self.file, self.line).strip()


class Place(NamedTuple):
    """Where something is being computed.

    Attributes:
        module (str, optional): Qualified name of the innermost module of the
            model that is running, ``''`` for the model itself; None if none
            of them is.
        source (Source, optional): The line that calls into torch; None where
            the module is a layer of torch's or of this package's.
        loss (bool): Whether it belongs to the losses.
    """

    module: str | None
    source: Source | None
    loss: bool


class Locator:
    """Tells where in a model the calling code is running.

    It reads the call stack, so that nothing is hooked into the model and
    methods count that are no module's ``forward``.

    What counts as part of the losses, looked for from the innermost call
    outwards:

    1. code of a Python module or package called ``loss``, ``losses`` or
       ``*_loss`` (``mmdet.models.losses``, ``torch.nn.modules.loss``), modules
       of a class from there, and the losses of ``torch.nn.functional``;
    2. a method of a module of the model with ``loss`` in its name
       (``loss_by_feat``), other than the ``loss`` of the model itself, which
       runs all of it;
    3. what runs while no module of the model does, once they have returned
       their outputs.

    A module's forward pass ends the search: what a head computes in
    ``forward`` is no loss, even if its ``loss`` called it.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model):
        self._names = {m: name for name, m in named_modules(model)}

    def __call__(self):
        """Look where the caller is running.

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
        # Before Python 3.13 the frame holds on to this copy of its variables
        # and would keep tensors alive that it has dropped itself.
        variables.clear()
    return owner if isinstance(owner, nn.Module) else None


def _source(frame):
    """The line that a frame is at, or None in a library."""
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
    """Whether a Python module is part of what computes losses."""
    return any(p.rpartition('_')[2] in _LOSSES for p in name.split('.'))
