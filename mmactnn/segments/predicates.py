"""Predicates of a segment's first run, which further runs repeat.

The derivative of a piecewise function such as ReLU depends on the piece in
which its input lies. From codes some inputs would come to lie in another one,
and gradients would be biased. The first run therefore keeps a bit for each
element and each end of a piece, and further runs move inputs to their pieces.
"""

import inspect
import itertools

import torch
import torch.nn.functional as F
from torch.autograd import Function

from .. import ops
from ..modules.function_mode import FunctionMode
from ..ops.layout import dense
from ..ops.quantize import VALID_DTYPES


class Predicates:
    """Predicates of one segment.

    Attributes:
        masks (list[Tensor]): uint8, those of the first run.
    """

    def __init__(self):
        self.masks = []
        self._node = None
        self._replayed = None

    def record(self):
        """Mode of the first run, a context."""
        return self._mode()

    def replay(self):
        """Mode of a further run, a context."""
        masks = self._node.saved_tensors if self._node is not None else ()
        self._replayed = iter(masks)
        return self._mode()

    def save(self):
        """Let autograd save the masks, for whoever changes saved tensors."""
        if self.masks:
            anchor = torch.empty(0, requires_grad=True)
            self._node = _Save.apply(anchor, *self.masks).grad_fn
            self.masks = []

    def _mode(self):
        mode = FunctionMode(_PIECEWISE.get)
        mode.scope = self
        return mode

    def settle(self, input, ends):
        """Record the pieces of an input, or move it to its pieces.

        Args:
            input (Tensor[*]): Input of a piecewise function.
            ends (Sequence[float]): Ends of its pieces.

        Returns:
            Tensor[*]: The input in the first run; else as the input, and in
            the pieces of the first run.
        """
        if self._replayed is None:
            values = dense(input.detach())
            for end in ends:
                mask = ops.relu_mask(values - end if end else values)[1]
                self.masks.append(mask)
            return input
        masks = list(itertools.islice(self._replayed, len(ends)))
        if len(masks) < len(ends):
            raise RuntimeError(
                'a segment that runs again calls more piecewise functions '
                'than in its first run'
            )
        return _Settle.apply(input, ends, masks)


class _Save(Function):
    @staticmethod
    def forward(ctx, anchor, *masks):
        ctx.save_for_backward(*masks)
        return anchor.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError('masks of a segment have no gradient')


class _Settle(Function):
    @staticmethod
    def forward(ctx, input, ends, masks):
        values = dense(input).clone()
        for end, mask in zip(ends, masks):
            above = ops.relu_mask_backward(torch.ones_like(values), mask)
            values = torch.where(
                above.bool(),
                values.clamp(min=_above(end, values.dtype)),
                values.clamp(max=end),
            )
        return values

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            'a segment that runs again is not differentiated itself'
        )


def _above(end, dtype):
    """A number a little larger than the end of a piece."""
    limits = torch.finfo(dtype)
    return end + max(limits.tiny, 2 * abs(end) * limits.eps)


def _handler(find_ends, overwrites):
    """Handler of a function, see :class:`FunctionMode`."""

    def handle(predicates, function, args, kwargs):
        input, *rest = args if args else (kwargs.pop('input'),)
        if (
            type(input) is not torch.Tensor
            or input.dtype not in VALID_DTYPES
            or not input.requires_grad
        ):
            return function(input, *rest, **kwargs)
        settled = predicates.settle(input, find_ends(*rest, **kwargs))
        if settled is not input and overwrites(*rest, **kwargs):
            # Whoever has the input reads the result there.
            with torch.no_grad():
                input.copy_(settled)
            settled = input
        return function(settled, *rest, **kwargs)

    return handle


def _add(find_ends, *functions):
    """Register piecewise functions, whose further arguments tell the ends."""
    for function in functions:
        name = getattr(function, '__name__', '')
        if name.endswith('_') and not name.endswith('__'):

            def overwrites(*args, **kwargs):
                return True
        elif 'inplace' in _parameters(function):
            place = list(_parameters(function)).index('inplace') - 1

            def overwrites(*args, inplace=False, place=place, **kwargs):
                return args[place] if len(args) > place else inplace
        else:

            def overwrites(*args, **kwargs):
                return False

        _PIECEWISE[function] = _handler(find_ends, overwrites)


def _parameters(function):
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of a builtin
        return ()


_PIECEWISE = {}
_add(
    lambda *args, **kwargs: (0.0,),
    F.relu,
    F.relu_,
    torch.relu,
    torch.relu_,
    torch.Tensor.relu,
    torch.Tensor.relu_,
    torch.abs,
    torch.Tensor.abs,
    F.leaky_relu,
    F.leaky_relu_,
    F.prelu,
    torch.prelu,
)
_add(lambda *args, **kwargs: (0.0, 6.0), F.relu6)
_add(lambda *args, **kwargs: (-3.0, 3.0), F.hardswish, F.hardsigmoid)


def _limits(min_val=-1.0, max_val=1.0, inplace=False):
    return min_val, max_val


def _clamp_limits(min=None, max=None):
    limits = (min, max)
    if any(isinstance(limit, torch.Tensor) for limit in limits):
        return ()
    return tuple(limit for limit in limits if limit is not None)


_add(_limits, F.hardtanh, F.hardtanh_)
_add(lambda lambd=0.5: (-lambd, lambd), F.softshrink, F.hardshrink)
_add(
    lambda threshold, value=0.0, inplace=False: (threshold,),
    F.threshold,
    torch.threshold,
)
_add(
    _clamp_limits,
    torch.clamp,
    torch.clip,
    torch.Tensor.clamp,
    torch.Tensor.clip,
    torch.Tensor.clamp_,
    torch.Tensor.clip_,
)
_add(
    lambda min: _clamp_limits(min),
    torch.clamp_min,
    torch.Tensor.clamp_min,
    torch.Tensor.clamp_min_,
)
_add(
    lambda max: _clamp_limits(max),
    torch.clamp_max,
    torch.Tensor.clamp_max,
    torch.Tensor.clamp_max_,
)
