"""Batch normalisation that keeps its input as codes."""

import weakref

import torch
from torch.autograd import Function

from ..codes.calls import Call
from ..ops.channels import channel_shape, dims_but_channels, memory_format
from .double_backward import first_order_only


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx,
        input,
        weight,
        bias,
        running_mean,
        running_var,
        batch_stats,
        momentum,
        eps,
        quantizer,
    ):
        # The op behind F.batch_norm. It also returns the statistics that the
        # backward pass needs.
        (output, save_mean, save_invstd, reserve, backend) = (
            torch.ops.aten._batch_norm_impl_index(
                input,
                weight,
                bias,
                running_mean,
                running_var,
                batch_stats,
                momentum,
                eps,
                torch.backends.cudnn.enabled,
            )
        )

        needs_input, needs_weight = ctx.needs_input_grad[:2]
        # With given statistics the output is linear in the input, whose
        # gradient then needs no input.
        ctx.format, kept = quantizer.keep(
            input, needed=needs_weight or (needs_input and batch_stats)
        )
        ctx.probe = quantizer.probe_norm(input)
        ctx.adaptive = quantizer.layer_bits
        ctx.backend, ctx.batch_stats, ctx.eps = backend, batch_stats, eps
        if batch_stats:
            running_mean = running_var = None
        statistics = (save_mean, save_invstd, reserve)
        ctx.save_for_backward(
            weight, running_mean, running_var, *statistics, *kept
        )
        ctx.source = weakref.ref(input)
        if quantizer.meter is not None:
            quantizer.record(kept, Call(input, output, statistics=statistics))
        return output

    @staticmethod
    @first_order_only('QBatchNorm', unless=lambda ctx: ctx.format is None)
    def backward(ctx, grad_output):
        (
            weight,
            running_mean,
            running_var,
            save_mean,
            save_invstd,
            reserve,
            *kept,
        ) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if not kept:
            grads = _affine_backward(
                grad_output, weight, running_var, ctx.eps, wanted
            )
            return *grads, *[None] * 6
        payload = ctx.format.payload(*kept)
        x = payload.unpack()
        # In the layout of the forward pass: cuDNN knows two.
        x = x.contiguous(memory_format=memory_format(x))
        grads = torch.ops.aten._batch_norm_impl_index_backward(
            ctx.backend,
            x,
            grad_output,
            weight,
            running_mean,
            running_var,
            save_mean,
            save_invstd,
            ctx.batch_stats,
            ctx.eps,
            wanted,
            reserve,
        )
        grads = [grad if want else None for grad, want in zip(grads, wanted)]
        if ctx.probe is not None:
            invstd = save_invstd
            if not ctx.batch_stats:
                invstd = torch.rsqrt(running_var + ctx.eps)
            ctx.probe.norm(
                payload,
                grad_output,
                grads[0] if ctx.batch_stats else None,
                grads[1],
                weight,
                invstd,
            )
        return *grads, *[None] * 6


def _affine_backward(grad_output, weight, running_var, eps, wanted):
    """Gradients of ``(x - mean) * scale + bias`` that do not need x.

    With the statistics of the batch the gradient of the input needs x. Then
    it is not wanted here, and ``running_var`` is None.
    """
    needs_input, _, needs_bias = wanted
    grad_input = grad_bias = None
    if needs_input:
        scale = torch.rsqrt(running_var + eps)
        if weight is not None:
            scale = scale * weight
        grad_input = grad_output * scale.view(channel_shape(grad_output)).to(
            grad_output.dtype
        )
    if needs_bias:
        grad_bias = grad_output.sum(
            dims_but_channels(grad_output),
            dtype=torch.promote_types(grad_output.dtype, torch.float32),
        )
    return grad_input, None, grad_bias


def batch_norm(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    batch_stats,
    momentum,
    eps,
    quantizer,
):
    """Batch normalisation whose backward is computed from codes.

    The gradients of weight and bias are unbiased; that of the input has a
    bias of second order, the variance of the rounding noise over the number
    of elements of a channel (ActNN, arXiv:2104.14129, Sec. 3.3).

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16.
        weight (Tensor[C], optional): Scale.
        bias (Tensor[C], optional): Shift.
        running_mean (Tensor[C], optional): Running mean, updated in place
            with batch statistics.
        running_var (Tensor[C], optional): Running variance, likewise.
        batch_stats (bool): Normalise with the statistics of the batch, not
            the running ones.
        momentum (float): Weight of the batch in the running statistics.
        eps (float): Added to the variance.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, C, *]: The output.
    """
    return _BatchNorm.apply(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        batch_stats,
        momentum,
        eps,
        quantizer,
    )
