"""Convolution whose weight is a function of parameters."""

import torch
from torch.autograd import Function

from .context import StandInContext
from .conv import Convolution, all_gradients
from .double_backward import first_order_only


class _DerivedConvolution(Function):
    @staticmethod
    def forward(ctx, input, bias, derive, geometry, quantizer, *sources):
        needs_input, needs_bias, _, _, _, *needs = ctx.needs_input_grad
        inner = StandInContext((needs_input, any(needs), needs_bias))
        output = Convolution.forward(
            inner, input, derive(*sources), bias, geometry, quantizer
        )
        _, *kept = inner.saved_tensors
        ctx.derive, ctx.count, ctx.record = derive, len(sources), inner.record
        ctx.adaptive, ctx.source = inner.adaptive, inner.source
        ctx.layer_bits = inner.layer_bits
        ctx.save_for_backward(*sources, *kept)
        return output

    @staticmethod
    @first_order_only('QConv')
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        sources, kept = saved[: ctx.count], saved[ctx.count :]
        needs_input, needs_bias, _, _, _, *needs = ctx.needs_input_grad
        with torch.enable_grad():
            leaves = [
                source.detach().requires_grad_(needed)
                for source, needed in zip(sources, needs)
            ]
            weight = ctx.derive(*leaves)
        grad_input, grad_weight, grad_bias = all_gradients(
            ctx.record,
            weight.detach(),
            kept,
            grad_output,
            (needs_input, any(needs), needs_bias),
        )
        grads = [None] * len(leaves)
        if grad_weight is not None:
            wanted = [i for i, needed in enumerate(needs) if needed]
            found = torch.autograd.grad(
                weight,
                [leaves[i] for i in wanted],
                grad_weight.to(weight.dtype),
            )
            for i, grad in zip(wanted, found):
                grads[i] = grad
        return grad_input, grad_bias, None, None, None, *grads


def derived_convolution(input, bias, derive, geometry, quantizer, *sources):
    """Convolve with a weight that is computed from parameters.

    The weight is computed again in the backward pass: neither it nor the
    tensors on the way to it are kept. Output and gradient of the input are
    exact; the gradients of the parameters are linear in the input, hence
    unbiased.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16.
        bias (Tensor[O], optional): Bias.
        derive (Callable): Computes the weight, of O, C / groups, *, from the
            parameters; differentiable, and without random numbers.
        geometry (tuple): As ``torch.ops.aten.convolution`` takes it.
        quantizer (LayerQuantizer): Settings of the layer.
        *sources (Tensor[*]): The parameters.

    Returns:
        Tensor[N, O, *]: The output.
    """
    return _DerivedConvolution.apply(
        input, bias, derive, geometry, quantizer, *sources
    )
