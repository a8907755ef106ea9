"""Rectifier with a trained slope."""

import weakref

import torch
from torch.autograd import Function

from .. import ops
from ..codes.calls import Call
from .double_backward import first_order_only


class _PReLU(Function):
    @staticmethod
    def forward(ctx, input, weight, quantizer):
        output = torch.prelu(input, weight)
        # With a slope NaN is not greater than 0, as in torch.
        _, mask = ops.relu_mask(input, slope=0.0)
        # Only elements below 0 count for the slope.
        ctx.format, kept = quantizer.keep(
            input.clamp(max=0), ctx.needs_input_grad[1]
        )
        ctx.stride = ops.layout.dense(input).stride()
        ctx.input_dtype = input.dtype
        ctx.source = weakref.ref(input)
        ctx.save_for_backward(weight, mask, *kept)
        if quantizer.meter is not None:
            quantizer.record((mask, *kept), Call(input, output, weight))
        return output

    @staticmethod
    @first_order_only('QPReLU')
    def backward(ctx, grad_output):
        weight, mask, *kept = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        grad = ops.layout.with_strides(grad_output, ctx.stride)
        passes = ops.relu_mask_backward(torch.ones_like(grad), mask) != 0
        grad_input = grad_weight = None
        if needs_weight:
            values = ctx.format.payload(*kept).unpack()
            product = (values * grad).masked_fill_(passes, 0)
            dims = [d for d in range(product.dim()) if d != 1]
            if weight.numel() == 1:
                dims = list(range(product.dim()))
            grad_weight = product.sum(dims, dtype=weight.dtype)
            grad_weight = grad_weight.view(weight.shape)
            del values, product
        if needs_input:
            shape = [1] * grad.dim()
            if weight.numel() > 1:
                shape[1] = -1
            slope = weight.to(grad.dtype).view(shape)
            grad_input = torch.where(passes, grad, slope * grad)
            grad_input = grad_input.to(ctx.input_dtype)
        return grad_input, grad_weight, None


def prelu(input, weight, quantizer):
    """``F.prelu`` that keeps a bit an element, and codes of negative ones.

    Output and gradient of the input are exact; that of the slope is linear
    in the input where the bit says that it is negative, hence unbiased.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16.
        weight (Tensor[1] | Tensor[C]): Slope below 0, one or one a channel.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, *]: The output.
    """
    return _PReLU.apply(input, weight, quantizer)
