"""Pooling that keeps positions or nothing."""

import functools

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from .. import ops
from .double_backward import first_order_only
from .stand_in import counted, hollow


class _MaxPool(Function):
    @staticmethod
    def forward(ctx, input, window, quantizer):
        output, indices, ctx.format = ops.max_pool2d(input, *window)
        ctx.save_for_backward(indices)
        ctx.stride = output.stride()
        exact = (input, counted(output.shape, torch.int64))
        quantizer.note(kept=(indices,), exact=exact)
        return output

    @staticmethod
    @first_order_only('QMaxPool2d')
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        grad = ops.layout.with_strides(grad_output, ctx.stride)
        grad_input = ops.max_pool2d_backward(grad, indices, ctx.format)
        return grad_input, None, None


class _AveragePool(Function):
    @staticmethod
    def forward(ctx, input, pool, pool_backward, quantizer):
        output = pool(input)
        ctx.pool_backward, ctx.shape = pool_backward, input.shape
        ctx.channels_last = ops.layout.suggests_channels_last(input)
        quantizer.note(kept=(), exact=(input,))
        return output

    @staticmethod
    def backward(ctx, grad_output):
        stand_in = hollow(ctx.shape, grad_output, ctx.channels_last)
        return ctx.pool_backward(grad_output, stand_in), None, None, None


def max_pool2d(
    input, kernel_size, stride, padding, dilation, ceil_mode, quantizer
):
    """Max pooling that keeps 4 bits an output.

    Args:
        input (Tensor[N, C, H, W] | Tensor[C, H, W]): float32, float16 or
            bfloat16.
        kernel_size (int | tuple[int, int]): As in ``F.max_pool2d``; 16 taps
            at most.
        stride (int | tuple[int, int], optional): As there.
        padding (int | tuple[int, int]): As there.
        dilation (int | tuple[int, int]): As there.
        ceil_mode (bool): As there.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor: The output.
    """
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    return _MaxPool.apply(input, window, quantizer)


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
