"""Checkpointing whose inputs are kept as codes."""

import contextlib
import functools

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import ops
from ..codes.hooks import segment_counter, top_hooks
from ..codes.quantizer import LayerQuantizer
from ..modules.execution import is_plain, is_transformed
from ..modules.function_mode import call_outside
from ..ops.quantize import VALID_DTYPES
from .predicates import Predicates
from .statistics import frozen_statistics, modules_of

DEFAULT_BITS = 8
# Smaller tensors stay as they are: their codes cost more calls than memory.
_MIN_NUMEL = 1024


def checkpoint(
    function,
    *args,
    bits=DEFAULT_BITS,
    group_size=ops.DEFAULT_GROUP_SIZE,
    use_reentrant=False,
    **kwargs,
):
    """Run a function that runs again in the backward pass, from codes.

    As ``torch.utils.checkpoint.checkpoint`` without reentrance, whose
    arguments it takes, but that large inputs are kept as codes. The result is
    exact. The backward pass computes gradients of the function at the decoded
    inputs, whose error at 8 bits is 1/700 of the range of a group.

    Kept exactly are parameters and other leaves, tensors without a gradient,
    and those of fewer than 1024 elements. Batch normalisations within update
    their running statistics once, if they belong to ``function``: to a
    module, to one that a method or a closure has, or to an argument.

    Args:
        function (Callable): The function. What it returns, and whatever else
            it does, must be the same when it runs again.
        *args (object): Its arguments; tensors may be in containers.
        bits (int, optional): Bits an element of an input. Valid values are 1
            to 8. Defaults to 8: predicates (``x > 0``) and gradients of
            functions that are not linear have a bias that grows with the
            square of the rounding error.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to 256.
        use_reentrant (bool, optional): Must be False.
        **kwargs (object): ``context_fn``, ``determinism_check``, ``debug``,
            ``early_stop`` and ``preserve_rng_state`` of torch's function, and
            keyword arguments of ``function``.

    Returns:
        object: The result of ``function``.

    Raises:
        ValueError: If ``use_reentrant`` is true, or ``bits`` or
            ``group_size`` is not valid.

    Examples:
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4)
        >>> x = torch.randn(10, 8, 64, requires_grad=True) * 1
        >>> mmactnn.checkpoint(layer, x).sum().backward()
    """
    if use_reentrant:
        raise ValueError(
            'use_reentrant must be False: checkpointing with reentrance '
            f'keeps its inputs itself, got {use_reentrant!r}'
        )
    return run_segment(
        _make_quantizer(bits, group_size), function, args, kwargs
    )


@functools.lru_cache
def _make_quantizer(bits, group_size):
    # Strict: a payload of fewer bits, from another layer, will not do.
    return LayerQuantizer(bits, group_size, strict=True)


def run_segment(quantizer, function, args, kwargs):
    """Run a function as a segment.

    Args:
        quantizer (LayerQuantizer): Settings of its inputs.
        function (Callable): See :func:`checkpoint`.
        args (tuple): Positional arguments.
        kwargs (dict): Keyword arguments of the function and of torch's
            checkpoint.

    Returns:
        object: The result of ``function``.
    """
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    if is_transformed() or torch.compiler.is_compiling():
        # Tracers and transforms know torch's own function.
        return torch_checkpoint.checkpoint(
            function, *args, use_reentrant=False, **options, **kwargs
        )
    return call_outside(_run, quantizer, function, args, kwargs, options)


# Arguments of torch's checkpoint, which functions cannot have.
_OPTIONS = (
    'context_fn',
    'determinism_check',
    'debug',
    'early_stop',
    'preserve_rng_state',
)


def _run(quantizer, function, args, kwargs, options):
    inputs, structure = tree_flatten((args, kwargs))
    del args, kwargs
    segment = _Segment(function, inputs, structure)
    del inputs, structure
    tensors = segment.keep(quantizer) if torch.is_grad_enabled() else ()
    if not tensors:
        return segment.run_plainly()
    count = segment_counter()
    if count is not None:
        segment.note = count(segment.codes_of(tensors))
    output = torch_checkpoint.checkpoint(
        segment, *tensors, use_reentrant=False, **options
    )
    if count is not None:
        count(segment.predicates.masks)
    segment.predicates.save()
    segment.note = None
    return output


@contextlib.contextmanager
def _noting(note):
    """Report the tensors that torch would keep without a segment."""
    if note is None:
        yield
        return
    pack, unpack = top_hooks(True)

    def pack_and_note(tensor):
        note(tensor)
        return pack(tensor)

    with saved_tensors_hooks(pack_and_note, unpack):
        yield


class _Kept:
    """Place of an input in what a segment keeps.

    Args:
        first (int): Place of its first tensor.
        stop (int): One past that of the last.
        format (PayloadFormat, optional): Format of its codes; None where it
            is kept exactly.
    """

    __slots__ = ('first', 'format', 'stop')

    def __init__(self, first, stop, format=None):
        self.first = first
        self.stop = stop
        self.format = format


class _Segment:
    """Function of kept tensors that computes a function of its inputs.

    Args:
        function (Callable): The function.
        inputs (list): Its arguments, flat.
        structure (TreeSpec): Structure of the arguments.

    Attributes:
        predicates (Predicates): Those of the first run.
        note (Callable, optional): Called with each tensor that autograd saves
            in the first run.
    """

    def __init__(self, function, inputs, structure):
        self.predicates = Predicates()
        self.note = None
        self._function = function
        # For the first run; for the others, without tensors.
        self._inputs = inputs
        self._structure = structure
        self._kept = {}
        self._modules = modules_of(function, inputs)
        self._runs_again = False

    def keep(self, quantizer):
        """Tensors to be kept for further runs.

        Args:
            quantizer (LayerQuantizer): Settings of the codes.

        Returns:
            list[Tensor]: Codes of large inputs, and the other tensors.
        """
        tensors = []
        for i, value in enumerate(self._inputs):
            if not isinstance(value, torch.Tensor):
                continue
            first, format, parts = len(tensors), None, (value,)
            if _is_coded(value):
                format, parts, _ = quantizer.keep_shared(value, value, True)
            tensors += parts
            self._kept[i] = _Kept(first, len(tensors), format)
        return tensors

    def codes_of(self, tensors):
        """Those of the kept tensors that stand for inputs.

        Args:
            tensors (Sequence[Tensor]): See :meth:`keep`.

        Returns:
            list[Tensor]: The tensors.
        """
        return [
            tensor
            for place in self._kept.values()
            if place.format is not None
            for tensor in tensors[place.first : place.stop]
        ]

    def run_plainly(self):
        """Run the function on its inputs.

        Returns:
            object: Its result.
        """
        return self._call(self._inputs)

    def __call__(self, *tensors):
        """Run the function, from its inputs the first time.

        Args:
            *tensors (Tensor): See :meth:`keep`.

        Returns:
            object: Its result.
        """
        if self._runs_again:
            inputs = self._decode(tensors)
            with frozen_statistics(self._modules), self.predicates.replay():
                return self._call(inputs)
        self._runs_again = True
        inputs = self._inputs
        # Nothing else holds the inputs of the first run.
        self._inputs = [
            None if i in self._kept else value
            for i, value in enumerate(inputs)
        ]
        with _noting(self.note), self.predicates.record():
            return self._call(inputs)

    def _call(self, inputs):
        args, kwargs = tree_unflatten(inputs, self._structure)
        del inputs
        return self._function(*args, **kwargs)

    def _decode(self, tensors):
        inputs = list(self._inputs)
        for i, place in self._kept.items():
            parts = tensors[place.first : place.stop]
            if place.format is None:
                (inputs[i],) = parts
            else:
                inputs[i] = _decode(place.format, parts)
        return inputs


def _is_coded(tensor):
    """Whether an input is kept as codes."""
    return (
        tensor.dtype in VALID_DTYPES
        and tensor.requires_grad
        # Parameters are kept anyway, other leaves by whoever made them.
        and tensor.grad_fn is not None
        and tensor.numel() >= _MIN_NUMEL
        and is_plain(tensor)
    )


def _decode(format, parts):
    """Decode an input, as no leaf, so that functions may overwrite it."""
    anchor = torch.empty(0, requires_grad=True)
    return _Decode.apply(anchor, format, *parts)


class _Decode(Function):
    @staticmethod
    def forward(ctx, anchor, format, *parts):
        return format.payload(*parts).unpack()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            'a segment that runs again is not differentiated itself'
        )
