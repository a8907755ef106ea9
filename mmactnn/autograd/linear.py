"""Fully connected layer that keeps its input as codes."""

import weakref

import torch
import torch.nn.functional as F
from torch.autograd import Function

from ..codes.calls import Call
from .autocast import cast, lower_dtype
from .double_backward import first_order_only


class _Linear(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype, quantizer):
        x, w, b = cast(dtype, input, weight, bias)
        output = F.linear(x, w, b)
        if output._is_view():
            # Not a view of the matrix product: autograd forbids the next layer
            # to overwrite a view from a custom function.
            output = torch.ops.aten._unsafe_view(output, output.shape)

        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.dtype, ctx.input_dtype = dtype, input.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Rows of the payload are samples: a vector is one.
        ctx.format, kept, ctx.probe = quantizer.keep_shared(
            input,
            x.unsqueeze(0) if x.dim() == 1 else x,
            needed=needs_weight,
            channels_last=True,
        )
        ctx.adaptive = quantizer.layer_bits
        # The parameter itself, not its copy in the dtype of autocast.
        ctx.save_for_backward(weight, *kept)
        ctx.source = weakref.ref(input)
        if quantizer.meter is not None:
            call = Call(
                x,
                output,
                w,
                needs_input=needs_input,
                needs_weight=needs_weight,
            )
            quantizer.record(kept, call)
        return output

    @staticmethod
    @first_order_only('QLinear', unless=lambda ctx: ctx.format is None)
    def backward(ctx, grad_output):
        weight, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = grad_output.reshape(-1, weight.shape[0])
        grad_input = grad_weight = grad_bias = None
        if needs_weight:
            # Before the input's gradient is made: the two are the largest
            # tensors here and need not live together.
            payload = ctx.format.payload(*kept)
            x = payload.unpack()
            grad_weight = rows.t() @ x.reshape(-1, weight.shape[1])
            del x
            grad_weight = grad_weight.to(weight.dtype)
            if ctx.probe is not None:
                samples = grad_output
                if grad_output.dim() == 1:
                    samples = grad_output.unsqueeze(0)
                ctx.probe.linear(
                    payload, samples, grad_weight, fan=weight.shape[1]
                )
        if needs_bias:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        if needs_input:
            (w,) = cast(ctx.dtype, weight)
            grad_input = (grad_output @ w).to(ctx.input_dtype)
        return grad_input, grad_weight, grad_bias, None, None


def linear(input, weight, bias, quantizer):
    """``F.linear`` whose weight gradient is computed from codes.

    The forward pass and the gradient of the input are exact. The gradient of
    the weight is linear in the input, hence unbiased (ActNN,
    arXiv:2104.14129, Sec. 3.1).

    Args:
        input (Tensor[*, I]): float32, float16 or bfloat16; under autocast it
            is cast to autocast's dtype.
        weight (Tensor[O, I]): Weight.
        bias (Tensor[O], optional): Bias.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*, O]: The output.
    """
    return _Linear.apply(input, weight, bias, lower_dtype(input), quantizer)
