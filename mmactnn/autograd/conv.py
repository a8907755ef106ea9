"""Convolution that keeps its input as codes."""

import math

import torch
from torch.autograd import Function

from .autocast import cast, lower_dtype
from .channels import as_memory_format, memory_format
from .double_backward import first_order_only
from .stand_in import hollow


class _Convolution(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype, geometry, quantizer):
        x, w, b = cast(dtype, input, weight, bias)
        output = torch.ops.aten.convolution(x, w, b, *geometry)

        ctx.geometry, ctx.dtype = geometry, dtype
        ctx.size, ctx.input_dtype = input.shape, input.dtype
        ctx.memory_format = memory_format(x)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.format, kept, ctx.watch = quantizer.keep_shared(
            input, x, needed=ctx.needs_input_grad[1]
        )
        ctx.chunk_bytes = quantizer.chunk_bytes
        # Read by the layer that takes the output, from the graph.
        ctx.slot = quantizer.slot
        # The parameter itself, not its copy in the dtype of autocast.
        ctx.save_for_backward(weight, *kept)
        quantizer.note(kept=kept, exact=(x, w))
        return output

    @staticmethod
    @first_order_only('QConv')
    def backward(ctx, grad_output):
        weight, *kept = ctx.saved_tensors
        (w,) = cast(ctx.dtype, weight)
        if ctx.memory_format != torch.contiguous_format:
            # Without the input itself at hand the weight's layout alone
            # tells cuDNN and oneDNN which one to work in.
            w = as_memory_format(w, ctx.memory_format)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        bias_size = None if ctx.bias_dtype is None else [grad_output.shape[1]]
        shape_only = _shape_only(ctx, grad_output)

        def gradients(x, *wanted, grad=grad_output):
            return torch.ops.aten.convolution_backward(
                grad, x, w, bias_size, *ctx.geometry, wanted
            )

        grad_input = grad_weight = grad_bias = None
        if needs_weight:
            # Before the input's gradient exists: the two are the largest
            # tensors here and need not live together.
            payload = ctx.format.payload(*kept)
            for part, x in payload.chunks(ctx.chunk_bytes):
                _, weight_part, bias_part = gradients(
                    x, False, True, needs_bias, grad=grad_output[part]
                )
                # Sums of parts in the dtype of the parameter.
                grad_weight = _add(grad_weight, weight_part, weight.dtype)
                if needs_bias:
                    grad_bias = _add(grad_bias, bias_part, ctx.bias_dtype)
            del x
            if ctx.watch is not None:
                ctx.watch.linear(
                    payload,
                    grad_output,
                    grad_weight,
                    _fan(ctx.size, grad_output.shape, weight, ctx.geometry),
                )
        elif needs_bias:
            _, _, grad_bias = gradients(shape_only, False, False, True)
        if needs_bias:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        if needs_input:
            grad_input, _, _ = gradients(shape_only, True, False, False)
            grad_input = grad_input.to(ctx.input_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None


def _shape_only(ctx, grad_output):
    """Stands for the input where only its shape counts."""
    transposed, groups = ctx.geometry[3], ctx.geometry[5]
    plain = not transposed and groups == 1 and len(ctx.size) == 4
    if (
        grad_output.is_cuda
        and plain
        and ctx.memory_format == torch.channels_last
    ):
        # cuDNN's path makes its arguments channels_last, needed or not.
        return hollow(ctx.size, grad_output, channels_last=True)
    return grad_output.new_empty(1).expand(ctx.size)


def _add(total, part, dtype):
    part = part.to(dtype)
    return part if total is None else total.add_(part)


def _fan(input_size, output_size, weight, geometry):
    """Products of an input and an output gradient, for each of the latter."""
    transposed = geometry[3]
    if not transposed:
        return weight[0].numel()
    positions = math.prod(input_size[2:]) / max(math.prod(output_size[2:]), 1)
    return weight.numel() * positions / output_size[1]


def convolution(input, weight, bias, geometry, quantizer):
    """Convolution, transposed or not, with the weight's gradient from codes.

    The forward pass and the gradient of the input are exact. The gradient of
    the weight is linear in the input, hence unbiased (ActNN,
    arXiv:2104.14129, Sec. 3.1).

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16; under autocast
            it is cast to autocast's dtype.
        weight (Tensor[O, C / groups, *]): Weight; Tensor[C, O / groups, *]
            if transposed.
        bias (Tensor[O], optional): Bias.
        geometry (tuple): Stride, padding, dilation (tuples of int),
            transposed (bool), output padding (tuple of int) and groups (int),
            as ``torch.ops.aten.convolution`` takes them.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, O, *]: The output.
    """
    dtype = lower_dtype(input)
    return _Convolution.apply(input, weight, bias, dtype, geometry, quantizer)
