"""Checkpointing whose inputs are kept as codes."""

import contextlib
import functools

import torch
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_leaves

from ..codes.hooks import meter_in_force
from ..codes.quantizer import LayerQuantizer
from ..modules.eager import meets_compiler, never_compiled
from ..modules.execution import is_transformed
from ..modules.function_mode import call_outside
from ..ops import DEFAULT_GROUP_SIZE
from .arguments import EncodedArguments
from .buffers import BufferWrites, reachable_modules
from .predicates import Predicates
from .random_states import random_states

# Fewer make gradients biased: functions in a segment are not linear.
DEFAULT_BITS = 8


def checkpoint(
    function,
    *args,
    use_reentrant=False,
    context_fn=torch_checkpoint.noop_context_fn,
    determinism_check='default',
    debug=False,
    early_stop=True,
    preserve_rng_state=True,
    bits=DEFAULT_BITS,
    group_size=DEFAULT_GROUP_SIZE,
    **kwargs,
):
    """Checkpoint a part of a model from codes of its inputs.

    As :func:`torch.utils.checkpoint.checkpoint` without reentrance: nothing
    that the function computes is kept, and the backward pass runs it again.
    The inputs are not kept either, but as codes. The output is exact; the
    gradients are those at the decoded inputs.

    Codes stand for floating-point tensors that an operation has computed from
    something that needs a gradient. Parameters and other leaves, integers,
    masks, small tensors and float64 are kept exactly, as are tensors in
    containers that ``torch.utils._pytree`` does not know.

    Buffers that the function's modules write to, such as running statistics,
    are written to once. Modules are found if the function is a module, a
    method of one, or has them in its closure, its defaults or its arguments.

    Args:
        function (Callable): Part of the forward pass.
        *args (object): Its arguments, which may be nested.
        use_reentrant (bool, optional): Must be False.
        context_fn (Callable, optional): See torch's function.
        determinism_check (str, optional): See torch's function.
        debug (bool, optional): See torch's function.
        early_stop (bool, optional): See torch's function.
        preserve_rng_state (bool, optional): See torch's function.
        bits (int, optional): Bits an element, 1 to 8. Fewer than 8 make the
            gradients biased. Defaults to 8.
        group_size (int, optional): Elements a range. Defaults to 256.
        **kwargs (object): Keyword arguments of the function.

    Returns:
        object: Result of the function.

    Raises:
        ValueError: If ``use_reentrant`` is not False, bits or group size are
            not valid, or as torch's function.

    Examples:
        >>> y = mmactnn.checkpoint(block, x)
    """
    if use_reentrant is not False:
        raise ValueError(
            'mmactnn.checkpoint works without reentrance only: use_reentrant '
            f'must be False, got {use_reentrant!r}'
        )
    options = dict(
        context_fn=context_fn,
        determinism_check=determinism_check,
        debug=debug,
        early_stop=early_stop,
        preserve_rng_state=preserve_rng_state,
    )
    quantizer = make_quantizer(bits, group_size)
    return run_segment(function, args, kwargs, quantizer, options)


@functools.lru_cache(maxsize=64)
def make_quantizer(bits, group_size):
    """Codec of segments without a model.

    Args:
        bits (int): Bits a code.
        group_size (int): Elements a range.

    Returns:
        LayerQuantizer: It rounds with the default generator.

    Raises:
        ValueError: If bits or group size are not valid.
    """
    if bits == 0 or bits is None:
        raise ValueError(
            f'bits of a segment must be a whole number from 1 to 8, got {bits}'
        )
    return LayerQuantizer(bits, group_size, strict=True)


def run_segment(function, args, kwargs, quantizer, options=None, modules=None):
    """Run a function as a segment.

    Args:
        function (Callable): See :func:`checkpoint`.
        args (tuple): Its arguments.
        kwargs (dict): Its keyword arguments.
        quantizer (LayerQuantizer): Codec of the inputs.
        options (dict, optional): Options of torch's function. Defaults to
            none.
        modules (Iterable[nn.Module], optional): Modules that it may call.
            Defaults to those that :func:`.buffers.reachable_modules` finds.

    Returns:
        object: Result of the function.
    """
    if not torch.is_grad_enabled() or is_transformed():
        return function(*args, **kwargs)
    arguments = function, args, kwargs, quantizer, dict(options or {}), modules
    if meets_compiler():
        from ..modules.graph_break import call_outside_graph

        return call_outside_graph(_run_eagerly, *arguments)
    # Its functions have no handlers, see PayloadCache and FunctionScope.
    return call_outside(_run_eagerly, *arguments)


def _run_eagerly(function, args, kwargs, quantizer, options, modules):
    contexts = _contexts(options)
    if modules is None:
        modules = reachable_modules(function, tree_leaves((args, kwargs)))
    encoded = EncodedArguments(args, kwargs, quantizer)
    kept, payloads = encoded.kept, encoded.payloads
    encoded.release()
    meter = meter_in_force()
    count = None if meter is None else meter.count_segment(payloads)
    states, random = random_states(), None
    if states is not None:
        # Both passes of a graph draw all of their random numbers.
        options['early_stop'] = False
        if options.get('preserve_rng_state', True):
            random = states.take()
        options['preserve_rng_state'] = False
    run = _Run(
        function, (args, kwargs), encoded, contexts, modules, count, random
    )
    del args, kwargs, payloads
    result = torch_checkpoint.checkpoint(
        run, *kept, use_reentrant=False, **options
    )
    if count is not None:
        count.finish()
    return result


def _contexts(options):
    """Take the contexts of both passes from options of torch's function.

    They do not cover decoding: a context that counts operations, such as
    that of selective checkpointing, expects the same ones in both passes.
    """
    context_fn = options.pop('context_fn', torch_checkpoint.noop_context_fn)
    if context_fn is torch_checkpoint.noop_context_fn:
        return contextlib.nullcontext(), contextlib.nullcontext()
    if options.get('debug'):
        raise ValueError(
            f'debug=True is incompatible with a context_fn, got {context_fn!r}'
        )
    return context_fn()


class _Run:
    """Function of a segment, for its first forward pass and later ones.

    Args:
        function (Callable): Function of the segment.
        arguments (tuple[tuple, dict]): Arguments of the first pass, which
            are dropped then.
        encoded (EncodedArguments): Recipe of the arguments of later passes.
        contexts (tuple): Contexts of the first and of later passes.
        modules (Iterable[nn.Module]): Modules that the function may call.
        count (SegmentCount, optional): Counter of what torch would keep.
        random (RandomState, optional): Random state in a captured graph.
    """

    def __init__(
        self,
        function,
        arguments,
        encoded,
        contexts,
        modules,
        count,
        random=None,
    ):
        self._function = function
        self._arguments = arguments
        self._encoded = encoded
        self._first, self._later = contexts
        self._writes = BufferWrites(modules)
        self._predicates = Predicates()
        self._count = count
        self._random = random

    @never_compiled
    def __call__(self, *kept):
        if self._arguments is None:
            args, kwargs = self._encoded.decode(kept)
            del kept
            with (
                self._drawing('again'),
                self._writes.discarded(),
                self._later,
                self._predicates.replaying(),
            ):
                return self._function(*args, **kwargs)
        (args, kwargs), self._arguments = self._arguments, None
        count, self._count = self._count, None
        listening = contextlib.nullcontext()
        if count is not None:
            listening = count.listening()
        with self._drawing('first'), self._first, listening:
            with self._predicates.recording():
                result = self._function(*args, **kwargs)
            self._writes.finish()
            if count is not None:
                count.keep(self._predicates.kept)
            return result
        raise RuntimeError(
            'the forward context of context_fn suppressed an exception of the '
            'segment, which has no result'
        )

    def _drawing(self, which):
        random = self._random
        if random is None:
            return contextlib.nullcontext()
        return random.drawing(getattr(random, which))
