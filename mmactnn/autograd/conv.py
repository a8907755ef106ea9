"""Convolution that keeps its input as codes."""

import math

import torch
from torch.autograd import Function

from ..payload import pieces
from ..units import MIB
from .autocast import cast, lower_dtype
from .channels import as_memory_format, dims_but_channels, memory_format
from .double_backward import first_order_only

# Up to this size of the input both gradients come from one call: what it
# takes on the host then counts for more than that two tensors live at once.
_SMALL_BYTES = 32 * MIB


class _Convolution(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype, geometry, quantizer):
        x, w, b = cast(dtype, input, weight, bias)
        output = torch.convolution(x, w, b, *geometry)

        ctx.geometry, ctx.dtype = geometry, dtype
        ctx.size, ctx.input_dtype = input.shape, input.dtype
        ctx.input_bytes = x.nbytes
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
        grad_input = grad_weight = grad_bias = None
        if needs_weight:
            # Before the input's gradient exists, if they are large: the two
            # are the largest tensors here and need not live together.
            payload = ctx.format.payload(*kept)
            together = needs_input and ctx.input_bytes <= min(
                _SMALL_BYTES, ctx.chunk_bytes or _SMALL_BYTES
            )
            for part, x in payload.chunks(ctx.chunk_bytes):
                whole = len(x) == len(grad_output)
                grad = grad_output if whole else grad_output[part]
                grad_input, weight_part, bias_part = _gradients(
                    ctx, grad, x, w, together, True, needs_bias
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
            grad_bias = grad_output.sum(
                dims_but_channels(grad_output), dtype=ctx.bias_dtype
            )
        if needs_input and grad_input is None:
            grad_input = _input_gradient(ctx, grad_output, w)
        if grad_input is not None:
            grad_input = grad_input.to(ctx.input_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None


def _gradients(ctx, grad_output, x, w, *wanted):
    """Those of input, weight and bias that are wanted, as torch has them."""
    bias_size = None if ctx.bias_dtype is None else [grad_output.shape[1]]
    return torch.ops.aten.convolution_backward.default(
        grad_output, x, w, bias_size, *ctx.geometry, wanted
    )


def _input_gradient(ctx, grad_output, w):
    """The gradient of the input alone, piece by piece if it is large."""
    parts = list(pieces(ctx.size[0], ctx.input_bytes, ctx.chunk_bytes))
    if len(parts) == 1:
        return _whole_input_gradient(ctx, grad_output, w)
    grad_input = torch.empty(
        ctx.size,
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=ctx.memory_format,
    )
    for part in parts:
        grad_input[part] = _whole_input_gradient(ctx, grad_output[part], w)
    return grad_input


def _whole_input_gradient(ctx, grad_output, w):
    stride, padding, dilation, transposed, _, groups = ctx.geometry
    size = (grad_output.shape[0], *ctx.size[1:])
    if grad_output.is_cuda and groups == 1 and not transposed:
        # A transposed convolution by name, the same kernels, and no input
        # need stand there for its shape.
        kernel = w.shape[2:]
        rest = tuple(
            size[d + 2]
            - (grad_output.shape[d + 2] - 1) * stride[d]
            + 2 * padding[d]
            - dilation[d] * (kernel[d] - 1)
            - 1
            for d in range(len(kernel))
        )
        return torch.convolution(
            grad_output, w, None, stride, padding, dilation, True, rest, 1
        )
    # An input of one number that is everywhere: only its shape counts.
    shape_only = torch.empty_strided(
        size, [0] * len(size), dtype=w.dtype, device=w.device
    )
    return _gradients(ctx, grad_output, shape_only, w, True, False, False)[0]


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
