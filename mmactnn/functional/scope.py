"""Scopes: the modules whose calls of torch's functions are compressed."""

import sys

import torch

from ..codes.hooks import top_hooks
from ..codes.quantizer import LayerQuantizer, OwnSettings
from ..modules.execution import (
    ORDINARY,
    has_function_mode,
    is_plain,
    is_transformed,
)
from ..modules.function_mode import FunctionMode, active_mode, call_outside
from ..ops.quantize import VALID_DTYPES
from ..registry import default_registry

# Python modules whose code a call passes on its way to a handler.
_ON_THE_WAY = (
    'torch.nn.functional',
    'torch.overrides',
    'torch._tensor',
    # F.max_pool2d, which chooses between two functions.
    'torch._jit_internal',
)
_PACKAGE = __name__.partition('.')[0]


class FunctionSettings:
    """Settings with which one module's calls of functions are compressed.

    Args:
        name (str): Qualified name of the module.
        level (Level): Level of the model.
        group_size (int): Elements a range.
        generator (RoundingGenerator): Source of random bits.
        cache (PayloadCache): Payloads that the layers of the model share.
        has_parameters (bool): Whether the module has parameters.
        excluded (frozenset[str], optional): Names of functions that filters
            exclude. Defaults to none.
        first_only (frozenset[str], optional): Names of the parts with several
            results of which the module reads the first one alone. Defaults to
            none.

    Attributes:
        make_meter (Callable, optional): Makes the meter of a function from
            the rule of its layer, while kept tensors are measured.
    """

    def __init__(
        self,
        name,
        level,
        group_size,
        generator,
        cache,
        has_parameters,
        excluded=frozenset(),
        first_only=frozenset(),
    ):
        self.name = name
        self.level = level
        self.group_size = group_size
        self.generator = generator
        self.cache = cache
        self.has_parameters = has_parameters
        self.excluded = excluded
        self.first_only = first_only
        self.make_meter = None
        self._quantizers = {}

    def quantizer_for(self, entry):
        """Settings of one function.

        Args:
            entry (FunctionEntry): The function.

        Returns:
            LayerQuantizer: The settings, exact ones where filters or rules
            say so.
        """
        quantizer = self._quantizers.get(entry.name)
        if quantizer is None:
            quantizer = self._make_quantizer(entry)
            self._quantizers[entry.name] = quantizer
        quantizer.meter = None
        if self.make_meter is not None:
            rule = default_registry.entry_of(entry.layer).saved_by_torch
            quantizer.meter = self.make_meter(rule)
        return quantizer

    def _make_quantizer(self, entry):
        if entry.name in self.excluded or (
            entry.needs_parameters and not self.has_parameters
        ):
            return LayerQuantizer(None, self.group_size)
        return LayerQuantizer.for_level(
            entry.layer,
            self.level,
            self.group_size,
            self.generator,
            OwnSettings(),
            f'{self.name}.{entry.name}' if self.name else entry.name,
            cache=self.cache,
        )

    def __getstate__(self):
        """For copies and pickles: without what is made again."""
        return dict(self.__dict__, make_meter=None, _quantizers={})


class FunctionScope:
    """A running forward pass of a module whose functions are compressed.

    Args:
        settings (FunctionSettings): Settings of the module.
        module (nn.Module): The module.

    Attributes:
        settings (FunctionSettings): The same.
    """

    __slots__ = ('_context', '_module', 'settings')

    def __init__(self, settings, module):
        self.settings = settings
        self._module = module
        self._context = _context()

    def reads_first_only(self, part):
        """Whether the module reads only the first result of a part.

        Args:
            part (nn.Module): A part of it, or any other module.
        """
        parts = self._module._modules
        return any(
            parts.get(name) is part for name in self.settings.first_only
        )

    def compress(self, entry, args, kwargs):
        """Call a compressed function.

        Args:
            entry (FunctionEntry): The function.
            args (tuple): Its arguments.
            kwargs (dict): Its keyword arguments.

        Returns:
            object: The result; NotImplemented where torch's function has to
            run.
        """
        # Code within a checkpointed block, or one without gradients, runs
        # again without this mode, unless it belongs to a module of its own.
        if self._context != _context():
            return NotImplemented
        if not args and 'input' in kwargs:
            # As by F.linear(input=x, weight=w).
            kwargs = dict(kwargs)
            args = (kwargs.pop('input'),)
        if not args or not _takes(entry, args, kwargs):
            return NotImplemented
        quantizer = self.settings.quantizer_for(entry)
        if quantizer.bits is None or _is_called_by_layer(self._module):
            return NotImplemented
        return entry.compress(quantizer, *args, **kwargs)


def _context():
    return top_hooks(True), torch.is_grad_enabled()


def _takes(entry, args, kwargs):
    """Whether arguments are ordinary tensors and need gradients."""
    # An equation of torch.einsum comes before its tensors.
    input = args[isinstance(args[0], str) and len(args) > 1]
    if (
        type(input) not in ORDINARY
        or input.dtype not in VALID_DTYPES
        or not is_plain(input)
    ):
        return False
    needed = entry.without_grad
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            if type(value) not in ORDINARY or value.is_meta:
                return False
            needed = needed or value.requires_grad
    return needed and (entry.without_grad or torch.is_grad_enabled())


def _is_called_by_layer(module):
    """Whether a forward pass calls that a compressed layer stands for.

    Such a layer was left exact on purpose. A module that computes otherwise
    than its parent may still call the parent's functions.

    Args:
        module (nn.Module): The module whose functions are compressed.
    """
    frame = sys._getframe(2)
    while frame is not None:
        home = frame.f_globals.get('__name__', '')
        if home.partition('.')[0] != _PACKAGE and home not in _ON_THE_WAY:
            code = frame.f_code
            return code in default_registry.codes and (
                frame.f_locals.get(code.co_varnames[0]) is not module
            )
        frame = frame.f_back
    return False


def call_in_scope(module, function, args, kwargs):
    """Call a function as part of a module's forward pass.

    Args:
        module (nn.Module): The module.
        function (Callable): The function.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.

    Returns:
        object: Its result.
    """
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    settings = module.__dict__.get('_functions')
    mode = active_mode()
    if (
        settings is None
        or not module.training
        or is_transformed()
        or has_function_mode()
    ):
        if mode is None:
            return function(*args, **kwargs)
        return call_outside(lambda: function(*args, **kwargs))
    scope = FunctionScope(settings, module)
    if mode is not None:
        before, mode.scope = mode.scope, scope
        try:
            return function(*args, **kwargs)
        finally:
            mode.scope = before
    mode = FunctionMode(default_registry.functions.get)
    mode.scope = scope
    with mode:
        return function(*args, **kwargs)
