"""Group normalisation that keeps its input as codes."""

import math
import weakref

import torch
from torch.autograd import Function

from ..codes.calls import Call
from ..ops.channels import dims_but_channels, memory_format
from .autocast import cast, full_dtype
from .double_backward import first_order_only


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx, input, weight, bias, dtype, num_groups, eps, quantizer):
        # As torch.group_norm does: CUDA's kernels take one memory format.
        layout = torch.contiguous_format
        if not input.is_cuda:
            layout = memory_format(input)
        dense = input.contiguous(memory_format=layout)
        x, w, b = cast(dtype, dense, weight, bias)
        # Samples, channels, elements of a channel.
        shape = (*x.shape[:2], math.prod(x.shape[2:]), num_groups)
        output, mean, rstd = torch.ops.aten.native_group_norm(
            x, w, b, *shape, eps
        )

        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.layout, ctx.shape, ctx.dtype = layout, shape, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # The input as it was before autocast's cast, which adds nothing.
        ctx.format, kept = quantizer.keep(
            dense, needed=needs_input or needs_weight
        )
        ctx.probe = quantizer.probe_norm(input)
        ctx.adaptive = quantizer.layer_bits
        ctx.save_for_backward(weight, mean, rstd, *kept)
        ctx.source = weakref.ref(input)
        if quantizer.meter is not None:
            quantizer.record(kept, Call(x, output, statistics=(mean, rstd)))
        return output

    @staticmethod
    @first_order_only('QGroupNorm', unless=lambda ctx: ctx.format is None)
    def backward(ctx, grad_output):
        weight, mean, rstd, *kept = ctx.saved_tensors
        nothing = [None] * 4
        if not kept:
            grad_bias = grad_output.sum(
                dims_but_channels(grad_output), dtype=mean.dtype
            )
            return None, None, grad_bias.to(ctx.bias_dtype), *nothing
        payload = ctx.format.payload(*kept)
        x = payload.unpack()
        input_dtype = x.dtype
        x, w = cast(ctx.dtype, x, weight)
        wanted = ctx.needs_input_grad[:3]
        grads = torch.ops.aten.native_group_norm_backward(
            grad_output.contiguous(memory_format=ctx.layout),
            x,
            mean,
            rstd,
            w,
            *ctx.shape,
            wanted,
        )
        grad_input, *others = (
            grad if want else None for grad, want in zip(grads, wanted)
        )
        (grad_input,) = cast(input_dtype, grad_input)
        if ctx.probe is not None:
            # Statistics as of a batch normalisation over all samples.
            invstd = rstd.square().mean(0).sqrt()
            channels = grad_output.shape[1] // invstd.numel()
            ctx.probe.norm(
                payload,
                grad_output,
                grad_input,
                others[0],
                weight,
                invstd.repeat_interleave(channels),
            )
        return grad_input, *others, *nothing


def group_norm(input, num_groups, weight, bias, eps, quantizer):
    """Group normalisation whose backward is computed from codes.

    Mean and variance are exact. The gradients of weight and bias are
    unbiased, being linear in the input; that of the input is quadratic in it
    and has a bias of second order, the variance of the rounding noise over
    the number of elements of a group of channels (as batch normalisation,
    ActNN, arXiv:2104.14129, Sec. 3.3).

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16; computed in
            float32 where autocast says so, but kept as it is.
        num_groups (int): Groups of channels.
        weight (Tensor[C], optional): Scale.
        bias (Tensor[C], optional): Shift.
        eps (float): Added to the variance.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, C, *]: The output.

    Raises:
        RuntimeError: If weight or bias are not of C elements.
    """
    return _GroupNorm.apply(
        input, weight, bias, full_dtype(input), num_groups, eps, quantizer
    )
