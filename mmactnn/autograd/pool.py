"""Pooling that keeps positions or nothing."""

import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from .. import ops
from ..codes.calls import Call
from .double_backward import linear_map
from .placeholders import meta_tensor, placeholder_like


class _MaxPool(Function):
    @staticmethod
    def forward(ctx, input, window, quantizer):
        output, indices, ctx.format = ops.max_pool2d(input, *window)
        ctx.save_for_backward(indices)
        ctx.stride = output.stride()
        if quantizer.meter is not None:
            positions = meta_tensor(output.shape, torch.int64)
            quantizer.record(
                (indices,), Call(input, output, indices=positions)
            )
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        stride, format, size = ctx.stride, ctx.format, grad_output.shape

        def spread(grad):
            grad = ops.layout.with_strides(grad, stride)
            return ops.max_pool2d_backward(grad, indices, format)

        def collect(values):
            return _values_at_maxima(values, indices, format, size)

        return linear_map(spread, collect, grad_output), None, None


class _WideMaxPool(Function):
    @staticmethod
    def forward(ctx, input, window, quantizer):
        output, indices = _pool_with_indices(input, *window)
        ctx.window, ctx.shape = window, input.shape
        ctx.channels_last = ops.layout.suggests_channels_last(input)
        taps = _taps_of(indices, window, input.shape[-1])
        ctx.save_for_backward(taps)
        if quantizer.meter is not None:
            quantizer.record((taps,), Call(input, output, indices=indices))
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (taps,) = ctx.saved_tensors
        window, shape = ctx.window, ctx.shape
        channels_last = ctx.channels_last

        def spread(grad):
            return _pool_backward(
                grad,
                placeholder_like(shape, grad, channels_last),
                *window,
                _places_of(taps, window, shape[-1]),
            )

        def collect(values):
            places = _places_of(taps, window, shape[-1]).flatten(-2)
            return values.flatten(-2).gather(-1, places).view(taps.shape)

        return linear_map(spread, collect, grad_output), None, None


_pool_with_indices = torch.ops.aten.max_pool2d_with_indices.default
_pool_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


def _starts(size, window, device):
    """Row and column of the first tap of each window, to broadcast."""
    _, stride, padding, _, _ = window
    rows, columns = (
        torch.arange(size[d - 2], device=device) * stride[d] - padding[d]
        for d in range(2)
    )
    return rows[:, None], columns


def _taps_of(indices, window, width):
    """Positions in windows from those in planes.

    Args:
        indices (Tensor[*, H, W]): int64, ``row * width + column``.
        window (tuple): See :class:`_WideMaxPool`.
        width (int): Width of the input.

    Returns:
        Tensor[*, H, W]: uint8, likewise inside of the window.
    """
    kernel, dilation = window[0], window[3]
    first, left = _starts(indices.shape, window, indices.device)
    row = (indices // width - first) // dilation[0]
    column = (indices % width - left) // dilation[1]
    return (row * kernel[1] + column).to(torch.uint8)


def _places_of(taps, window, width):
    """Inverse of :func:`_taps_of`."""
    kernel, dilation = window[0], window[3]
    first, left = _starts(taps.shape, window, taps.device)
    taps = taps.long()
    row = taps // kernel[1] * dilation[0] + first
    return row * width + taps % kernel[1] * dilation[1] + left


class _AveragePool(Function):
    @staticmethod
    def forward(ctx, input, pool, pool_backward, quantizer):
        output = pool(input)
        ctx.pool, ctx.pool_backward = pool, pool_backward
        ctx.shape = input.shape
        ctx.channels_last = ops.layout.suggests_channels_last(input)
        if quantizer.meter is not None:
            quantizer.record((), Call(input, output))
        return output

    @staticmethod
    def backward(ctx, grad_output):
        shape, channels_last = ctx.shape, ctx.channels_last
        pool_backward = ctx.pool_backward

        def spread(grad):
            return pool_backward(
                grad, placeholder_like(shape, grad, channels_last)
            )

        grad_input = linear_map(spread, ctx.pool, grad_output)
        return grad_input, None, None, None


def _values_at_maxima(values, indices, format, size):
    """Values at the positions of maxima: adjoint of max pooling's gradient.

    Args:
        values (Tensor[N, C, H, W] | Tensor[C, H, W]): Values, in the shape of
            the input.
        indices (Tensor[ceil(numel / 2)]): uint8, see
            :func:`mmactnn.ops.max_pool2d`.
        format (PoolFormat): See there.
        size (torch.Size): Shape of the output.

    Returns:
        Tensor: The values, in the shape of the output.
    """
    taps = torch.stack([indices & 15, indices >> 4], dim=1).flatten()
    taps = taps[: size.numel()].long()
    if format.channels_last:
        taps = taps.view(*size[:-3], *size[-2:], size[-3]).movedim(-1, -3)
    else:
        taps = taps.view(size)
    width = format.kernel_size[1]
    places = []
    for d, tap in enumerate((taps // width, taps % width)):
        start = torch.arange(size[d - 2], device=taps.device)
        start = start * format.stride[d] - format.padding[d]
        place = tap * format.dilation[d]
        places.append(place + (start[:, None] if d == 0 else start))
    flat = places[0] * format.input_size[1] + places[1]
    found = values.flatten(-2).gather(-1, flat.flatten(-2))
    return found.view(size)


def max_pool2d(
    input, kernel_size, stride, padding, dilation, ceil_mode, quantizer
):
    """Max pooling that keeps 4 bits an output; 8 for more than 16 taps.

    Args:
        input (Tensor[N, C, H, W] | Tensor[C, H, W]): float32, float16 or
            bfloat16.
        kernel_size (int | tuple[int, int]): As in ``F.max_pool2d``; 256 taps
            at most.
        stride (int | tuple[int, int], optional): As there.
        padding (int | tuple[int, int]): As there.
        dilation (int | tuple[int, int]): As there.
        ceil_mode (bool): As there.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor: The output.
    """
    if math.prod(ops.as_pair(kernel_size)) <= ops.MAX_TAPS:
        window = (kernel_size, stride, padding, dilation, ceil_mode)
        return _MaxPool.apply(input, window, quantizer)
    # As in torch, an empty sequence means None.
    stride = kernel_size if stride in (None, (), []) else stride
    sizes = map(ops.as_pair, (kernel_size, stride, padding, dilation))
    return _WideMaxPool.apply(input, (*sizes, ceil_mode), quantizer)


def avg_pool2d(
    input,
    kernel_size,
    stride,
    padding,
    ceil_mode,
    count_include_pad,
    divisor_override,
    quantizer,
):
    """Average pooling that keeps nothing.

    Args:
        input (Tensor[N, C, H, W] | Tensor[C, H, W]): Any float dtype.
        kernel_size (int | tuple[int, int]): As in ``F.avg_pool2d``.
        stride (int | tuple[int, int], optional): As there.
        padding (int | tuple[int, int]): As there.
        ceil_mode (bool): As there.
        count_include_pad (bool): As there.
        divisor_override (int, optional): As there.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor: The output.
    """
    window = dict(
        kernel_size=_pair(kernel_size),
        stride=() if stride is None else _pair(stride),
        padding=_pair(padding),
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor_override=divisor_override,
    )
    backward = torch.ops.aten.avg_pool2d_backward.default
    return _AveragePool.apply(
        input,
        functools.partial(F.avg_pool2d, **window),
        functools.partial(backward, **window),
        quantizer,
    )


def adaptive_avg_pool2d(input, output_size, quantizer):
    """Adaptive average pooling that keeps nothing.

    Args:
        input (Tensor[N, C, H, W] | Tensor[C, H, W]): Any float dtype.
        output_size (int | tuple[int, int]): As in
            ``F.adaptive_avg_pool2d``, but not (1, 1), which torch computes as
            a mean.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor: The output.
    """
    return _AveragePool.apply(
        input,
        functools.partial(F.adaptive_avg_pool2d, output_size=output_size),
        torch.ops.aten._adaptive_avg_pool2d_backward.default,
        quantizer,
    )
