"""Predicates of a segment: decisions by values, kept from its first pass.

A function such as ReLU has a derivative that jumps. Computed again from
decoded values, elements close to the jump would get the derivative of the
other side, and gradients would be biased: by half of their error for 8-bit
codes. The first pass therefore keeps the side of each element as a bit, and
later passes move values of the other side to the edge of the right one.
Comparisons, indices and numbers that Python reads are kept as they are.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..codes.exact import BoolTensor
from ..extension import has_kernels
from ..ops.quantize import VALID_DTYPES


class _Jump(NamedTuple):
    """Place where the derivative of a function jumps.

    Attributes:
        value (float): Argument of the function there.
        goes_up (bool): Whether the value itself belongs to the side above.
    """

    value: float
    goes_up: bool = False

    def above(self, x):
        """Find the elements above.

        Args:
            x (Tensor[*]): Values.

        Returns:
            Tensor[*]: bool.
        """
        return x >= self.value if self.goes_up else x > self.value

    def edges(self, dtype):
        """Largest value below and smallest one above.

        Args:
            dtype (torch.dtype): Dtype of values.

        Returns:
            tuple[float, float]: The edges.
        """
        at = torch.tensor(self.value, dtype=dtype, device='cpu')
        sign = -1 if self.goes_up else 1
        # Not a denormal number, which a device may flush to zero.
        beyond = sign * torch.finfo(dtype).tiny
        if self.value:
            end = at.new_full((), sign * math.inf)
            beyond = torch.nextafter(at, end).item()
        at = at.item()
        return (beyond, at) if self.goes_up else (at, beyond)


def _always(*jumps):
    return lambda args, kwargs: jumps


def _argument(index, name, goes_up, default=None):
    """Jump at an argument of the function, if that is a number."""

    def jumps(args, kwargs):
        value = kwargs.get(name, default)
        if len(args) > index:
            value = args[index]
        if not isinstance(value, (int, float)):
            return ()
        return (_Jump(float(value), goes_up),)

    return jumps


def _both(first, second):
    return lambda args, kwargs: first(args, kwargs) + second(args, kwargs)


_T = torch.Tensor
# Functions of one tensor whose derivative jumps.
_JUMPS = {
    function: jumps
    for jumps, functions in (
        (
            _always(_Jump(0.0)),
            (
                *(F.relu, F.relu_, torch.relu, torch.relu_),
                *(_T.relu, _T.relu_),
                *(F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, _T.prelu),
                *(F.elu, F.elu_, F.celu, F.celu_, F.selu, F.selu_),
            ),
        ),
        # The derivative at 0 is 0.
        (
            _always(_Jump(0.0, True), _Jump(0.0)),
            (torch.abs, torch.abs_, _T.abs, _T.abs_, _T.__abs__),
        ),
        (_always(_Jump(0.0), _Jump(6.0, True)), (F.relu6,)),
        (
            _always(_Jump(-3.0), _Jump(3.0, True)),
            (F.hardswish, F.hardsigmoid),
        ),
        (
            _both(
                _argument(1, 'min_val', False, -1.0),
                _argument(2, 'max_val', True, 1.0),
            ),
            (F.hardtanh, F.hardtanh_),
        ),
        (
            _both(_argument(1, 'min', True), _argument(2, 'max', False)),
            (
                *(torch.clamp, torch.clamp_, torch.clip, torch.clip_),
                *(_T.clamp, _T.clamp_, _T.clip, _T.clip_),
            ),
        ),
        (
            _argument(1, 'min', True),
            (
                *(torch.clamp_min, torch.clamp_min_),
                *(_T.clamp_min, _T.clamp_min_),
            ),
        ),
        (
            _argument(1, 'max', False),
            (
                *(torch.clamp_max, torch.clamp_max_),
                *(_T.clamp_max, _T.clamp_max_),
            ),
        ),
        (
            _argument(1, 'threshold', False),
            (F.threshold, F.threshold_, torch.threshold, torch.threshold_),
        ),
    )
    for function in functions
}
# With a probability of 0 torch keeps a mask even so, and whatever is computed
# before a mask is computed again.
_DROPOUTS = frozenset(
    (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
)
_READS = frozenset(
    (
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__index__,
    )
)


class Predicates:
    """Decisions of one call of a segment.

    Attributes:
        kept (tuple[Tensor]): Tensors that are kept for later passes.
    """

    def __init__(self):
        self._entries = []

    def recording(self):
        """Record decisions, as a context."""
        return _Record(self._entries)

    def replaying(self):
        """Decide as recorded, as a context."""
        return _Replay(self._entries)

    @property
    def kept(self):
        """tuple[Tensor]: See the class."""
        found = []
        for _, value in self._entries:
            values = value if isinstance(value, tuple) else (value,)
            found += [
                getattr(v, 'kept', v)
                for v in values
                if isinstance(v, (_Mask, torch.Tensor))
            ]
        return tuple(found)


class _Record(TorchFunctionMode):
    def __init__(self, entries):
        super().__init__()
        self._entries = entries

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        jumps = _jumps_of(function, args, kwargs)
        if jumps:
            x = args[0].detach()
            masks = tuple(_Mask.above(x, jump) for jump in jumps)
            self._entries.append((function, masks))
            return function(*args, **kwargs)
        if function in _DROPOUTS and _keeps_all(*args, **kwargs):
            return args[0].clone()
        result = function(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            if function in _READS:
                self._entries.append((function, result))
        elif _decides(result, args):
            kept = result.detach()
            if kept.dtype == torch.bool:
                kept = _Mask(kept)
            self._entries.append((function, kept))
        return result


class _Replay(TorchFunctionMode):
    def __init__(self, entries):
        super().__init__()
        self._entries = iter(entries)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        jumps = _jumps_of(function, args, kwargs)
        if jumps:
            masks, (x, *others) = self._next(function), args
            for jump, mask in zip(jumps, masks):
                x = _Moved.apply(x, jump, mask)
            if _is_in_place(function, kwargs, others):
                with torch.no_grad():
                    args[0].copy_(x)
                x = args[0]
            return function(x, *others, **kwargs)
        if function in _DROPOUTS and _keeps_all(*args, **kwargs):
            return args[0].clone()
        if function in _READS:
            return self._next(function)
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor) and _decides(result, args):
            kept = self._next(function)
            if isinstance(kept, _Mask):
                kept = kept.unpack()
            if kept.shape != result.shape:
                raise _mismatch(function)
            return kept.clone()
        return result

    def _next(self, function):
        recorded, value = next(self._entries, (None, None))
        if recorded is not function:
            raise _mismatch(function)
        return value


class _Moved(torch.autograd.Function):
    """Values moved to the side of a jump that a mask tells."""

    @staticmethod
    def forward(ctx, x, jump, mask):
        bits = mask.unpack()
        if bits.shape != x.shape:
            raise _mismatch('a function with a jump')
        below, above = jump.edges(x.dtype)
        # NaN stays.
        return torch.where(bits, x.clamp_min(above), x.clamp_max(below))

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None, None


class _Mask:
    """Booleans as bits.

    Args:
        mask (Tensor[*]): bool; or, where there are kernels, float32, float16
            or bfloat16, of which the positive ones count. Any layout.
    """

    def __init__(self, mask):
        self.kept, self._payload = mask, None
        if has_kernels(mask.device.type):
            self._payload = BoolTensor.pack(mask)
            (self.kept,) = self._payload.operands

    @classmethod
    def above(cls, x, jump):
        """Mask of the values above a jump.

        Args:
            x (Tensor[*]): Floating point, any layout.
            jump (_Jump): The jump.

        Returns:
            _Mask: The mask.
        """
        # One kernel in place of three.
        direct = (
            jump == _Jump(0.0)
            and x.dtype in VALID_DTYPES
            and has_kernels(x.device.type)
        )
        return cls(x if direct else jump.above(x))

    def unpack(self):
        """Make the booleans again.

        Returns:
            Tensor[*]: bool.
        """
        return self.kept if self._payload is None else self._payload.unpack()


def _jumps_of(function, args, kwargs):
    """Jumps of a function in this call, if its argument is one tensor."""
    jumps = _JUMPS.get(function)
    if jumps is None or not args:
        return ()
    x = args[0]
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return ()
    return jumps(args, kwargs)


def _decides(result, args):
    """Whether a tensor is no smooth function of arguments."""
    return (
        not result.dtype.is_floating_point
        and not result.dtype.is_complex
        and any(
            isinstance(a, torch.Tensor) and a.is_floating_point() for a in args
        )
    )


def _keeps_all(input=None, p=0.5, training=True, inplace=False):
    """Whether dropout in training drops nothing, from its arguments."""
    return input is not None and p == 0 and training and not inplace


def _is_in_place(function, kwargs, others):
    """Whether a function overwrites its input, by torch's conventions."""
    name = function.__name__
    if name.endswith('_') and not name.endswith('__'):
        return True
    # Not by equality, which 1 has, too.
    return kwargs.get('inplace') is True or any(o is True for o in others)


def _mismatch(function):
    name = getattr(function, '__name__', function)
    return RuntimeError(
        f'a segment ran other functions again than at first, at {name}: its '
        'function must compute the same twice'
    )
