"""Predicates of a segment: decisions by values, kept from its first pass.

A function such as ReLU has a derivative that jumps. Computed again from
decoded values, elements close to the jump would get the derivative of the
other side, and gradients would be biased: by half of their error for 8-bit
codes. The first pass therefore keeps the side of each element as a bit, and
later passes move values of the other side to the edge of the right one.
Comparisons, indices and numbers that Python reads are kept as they are.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..extension import has_kernels
from ..ops import layout, relu_mask, relu_mask_backward
from ..ops.quantize import VALID_DTYPES


def _at(*points):
    return lambda args, kwargs: points


def _argument(index, name, default=None):
    def get(args, kwargs):
        if len(args) > index:
            return args[index]
        return kwargs.get(name, default)

    return get


def _at_bounds(low, high=None):
    """Bounds of a clamp, as far as they are numbers."""

    def points(args, kwargs):
        found = [get(args, kwargs) for get in (low, high) if get is not None]
        return tuple(p for p in found if isinstance(p, (int, float)))

    return points


_MIN, _MAX = _argument(1, 'min'), _argument(2, 'max')
# Values at which the derivative of a function of one tensor jumps.
_JUMPS = {
    function: points
    for points, functions in (
        (
            _at(0.0),
            (
                *(F.relu, F.relu_, torch.relu, torch.relu_),
                *(torch.Tensor.relu, torch.Tensor.relu_),
                *(F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu),
                *(F.elu, F.elu_, F.celu, F.celu_, F.selu, F.selu_),
                *(torch.abs, torch.Tensor.abs, torch.Tensor.abs_),
                torch.Tensor.__abs__,
            ),
        ),
        (_at(0.0, 6.0), (F.relu6,)),
        (_at(-3.0, 3.0), (F.hardswish, F.hardsigmoid)),
        (
            _at_bounds(
                _argument(1, 'min_val', -1.0), _argument(2, 'max_val', 1.0)
            ),
            (F.hardtanh, F.hardtanh_),
        ),
        (
            _at_bounds(_MIN, _MAX),
            (
                *(torch.clamp, torch.clamp_, torch.clip, torch.clip_),
                *(torch.Tensor.clamp, torch.Tensor.clamp_),
                *(torch.Tensor.clip, torch.Tensor.clip_),
            ),
        ),
        (
            _at_bounds(_MIN),
            (
                *(torch.clamp_min, torch.clamp_min_),
                *(torch.Tensor.clamp_min, torch.Tensor.clamp_min_),
            ),
        ),
        (
            _at_bounds(_argument(1, 'max')),
            (
                *(torch.clamp_max, torch.clamp_max_),
                *(torch.Tensor.clamp_max, torch.Tensor.clamp_max_),
            ),
        ),
        (
            _at_bounds(_argument(1, 'threshold')),
            (F.threshold, F.threshold_, torch.threshold, torch.threshold_),
        ),
    )
    for function in functions
}
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
        points = _points(function, args, kwargs)
        if points:
            x = args[0].detach()
            masks = tuple(_Mask.above(x, point) for point in points)
            self._entries.append((function, masks))
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
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
        points = _points(function, args, kwargs)
        if points:
            masks, (x, *others) = self._next(function), args
            for point, mask in zip(points, masks):
                x = _Moved.apply(x, point, mask)
            if _is_in_place(function, kwargs, others):
                with torch.no_grad():
                    args[0].copy_(x)
                x = args[0]
            return function(x, *others, **kwargs)
        if function in _READS:
            return self._next(function)
        result = function(*args, **kwargs)
        if _decides(result, args):
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
    """Values moved to the side of a point that a mask tells."""

    @staticmethod
    def forward(ctx, x, point, mask):
        above = torch.full((), point, dtype=x.dtype, device=x.device)
        if point:
            above = torch.nextafter(above, above.new_full((), float('inf')))
        else:
            # Not a denormal number, which a device may flush to zero.
            above = above.new_full((), torch.finfo(x.dtype).tiny)
        bits = mask.unpack()
        if bits.shape != x.shape:
            raise _mismatch('a function with a jump')
        # NaN stays.
        return torch.where(bits, x.clamp_min(above), x.clamp_max(point))

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
        self._shape = mask.shape
        self.kept = mask
        self._packed = has_kernels(mask.device.type)
        if self._packed:
            values = mask if mask.is_floating_point() else mask.half()
            values = layout.dense(values)
            self._stride = values.stride()
            _, self.kept = relu_mask(values)

    @classmethod
    def above(cls, x, point):
        """Mask of the values above a point.

        Args:
            x (Tensor[*]): Floating point, any layout.
            point (float): The point.

        Returns:
            _Mask: The mask.
        """
        direct = x.dtype in VALID_DTYPES and has_kernels(x.device.type)
        return cls((x - point if point else x) if direct else x > point)

    def unpack(self):
        """Make the booleans again.

        Returns:
            Tensor[*]: bool.
        """
        if not self._packed:
            return self.kept
        ones = torch.empty_strided(
            self._shape,
            self._stride,
            dtype=torch.float16,
            device=self.kept.device,
        ).fill_(1)
        return relu_mask_backward(ones, self.kept) > 0


def _points(function, args, kwargs):
    """Jumps of a function in this call, if its argument is one tensor."""
    points = _JUMPS.get(function)
    if points is None or not args:
        return ()
    x = args[0]
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return ()
    return points(args, kwargs)


def _decides(result, args):
    """Whether a result is no smooth function of arguments."""
    return (
        isinstance(result, torch.Tensor)
        and not result.is_floating_point()
        and not result.is_complex()
        and any(
            isinstance(a, torch.Tensor) and a.is_floating_point() for a in args
        )
    )


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
