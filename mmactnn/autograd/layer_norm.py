"""Layer normalisation that shares codes with the layers that read it."""

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import Function

from ..codes.calls import Call
from ..codes.normalised import NormalisedTensor
from ..codes.payload import CentredTensor
from .autocast import cast, full_dtype
from .double_backward import first_order_only

_native_layer_norm = torch.ops.aten.native_layer_norm.default


class _Kind(NamedTuple):
    """A normalisation.

    Attributes:
        layer (str): Name of the compressed layer.
        normalise (Callable): Takes the arguments of ``native_layer_norm``, and
            returns output, mean and inverse deviation.
        subtracts_mean (bool): Whether the mean is subtracted; else it is 0.
    """

    layer: str
    normalise: Callable
    subtracts_mean: bool


def _native_rms_norm(input, shape, weight, bias, eps):
    """RMS normalisation as ``native_layer_norm``."""
    output, scale = torch.ops.aten._fused_rms_norm(input, shape, weight, eps)
    if bias is not None:
        output += bias
    if not input.is_cuda:
        # The dtype of statistics of layer normalisation.
        scale = scale.to(input.dtype)
    return output, torch.zeros_like(scale), scale


_LAYER_NORM = _Kind('QLayerNorm', _native_layer_norm, True)
_RMS_NORM = _Kind('QRMSNorm', _native_rms_norm, False)


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx, input, weight, bias, dtype, shape, eps, quantizer, made, kind
    ):
        x, w, b = cast(dtype, input, weight, bias)
        output, mean, rstd = kind.normalise(x, shape, w, b, eps)
        ctx.kind = kind
        ctx.shape, ctx.dtype, ctx.input_dtype = shape, dtype, input.dtype
        ctx.format = None
        kept = ()
        if any(ctx.needs_input_grad[:2]):
            # As the input is, before a cast of autocast, which adds nothing.
            payload = _pack(
                input, shape, eps, mean, rstd, quantizer, kind.normalise
            )
            ctx.format = payload.format._replace(dtype=output.dtype)
            kept = payload.tensors
            payload = ctx.format.make(*payload.operands)
            made.append(NormalisedTensor.of(payload, weight, bias))
        ctx.save_for_backward(weight, bias, rstd, *kept)
        ctx.source = weakref.ref(input)
        if quantizer.meter is not None:
            statistics = (mean, rstd) if kind.subtracts_mean else (rstd,)
            call = Call(x, output, w, statistics)
            quantizer.record(kept, call)
        return output

    @staticmethod
    @first_order_only(
        lambda ctx: ctx.kind.layer, unless=lambda ctx: ctx.format is None
    )
    def backward(ctx, grad_output):
        weight, bias, rstd, *kept = ctx.saved_tensors
        nothing = [None] * 6
        if not kept:
            dims = tuple(range(grad_output.dim() - len(ctx.shape)))
            grad_bias = grad_output.sum(dims) if dims else grad_output
            return None, None, grad_bias.to(bias.dtype), *nothing
        normalised = ctx.format.payload(*kept).unpack()
        normalised = normalised.view(grad_output.shape)
        w, b = cast(ctx.dtype, weight, bias)
        grads = torch.ops.aten.native_layer_norm_backward(
            grad_output,
            normalised,
            ctx.shape,
            # Mean and inverse deviation of what is normalised already.
            torch.zeros_like(rstd),
            torch.ones_like(rstd),
            w,
            b,
            ctx.needs_input_grad[:3],
        )
        del normalised
        grad_input, *others = (
            grad if want else None
            for grad, want in zip(grads, ctx.needs_input_grad)
        )
        if grad_input is not None:
            out = grad_input
            if out.dtype != ctx.input_dtype:
                out = torch.empty_like(out, dtype=ctx.input_dtype)
            grad_input = torch.mul(grad_input, rstd, out=out)
            if not ctx.kind.subtracts_mean:
                grad_input += _mean(grad_output, w, ctx.shape) * rstd
        grad_weight, grad_bias = (
            None if grad is None else grad.to(parameter.dtype)
            for grad, parameter in zip(others, (weight, bias))
        )
        return grad_input, grad_weight, grad_bias, *nothing


def _mean(grad_output, weight, shape):
    """Mean of the normalised value's gradient, which the kernel subtracts."""
    dims = tuple(range(-len(shape), 0))
    if weight is not None:
        grad_output = grad_output * weight
    return grad_output.mean(dims, keepdim=True, dtype=torch.float32)


def _pack(input, shape, eps, mean, rstd, quantizer, normalise):
    """Quantise the normalised value, less the means of channels."""
    # The bias of a normalisation without a weight: one pass over the input.
    shift = _negative_means(input, shape, mean, rstd)
    rest = normalise(input, shape, None, shift, eps)[0]
    if rest.dim() == len(shape):
        rest = rest.unsqueeze(0)
    payload = quantizer.pack(rest)
    format = payload.format._replace(kind='centred')
    return CentredTensor(format, shift.float().neg_(), *payload.operands)


def _negative_means(input, shape, mean, rstd):
    """Means of the channels of the normalised value, times -1.

    They need not be exact, as their rounding is that of what is encoded, too.
    """
    rows = input.reshape(-1, math.prod(shape))
    dtype = rows.dtype
    if dtype == torch.float16:
        # The sums may be larger than its largest number.
        rows = rows.float()
    mean, rstd = mean.flatten(), rstd.flatten()
    offset = torch.dot(mean, rstd)
    if rows.dtype != rstd.dtype:
        offset, rstd = offset.to(rows.dtype), rstd.to(rows.dtype)
    share = 1 / max(1, rows.shape[0])
    # One kernel: its calls take longer than itself.
    means = torch.addmv(
        offset.expand(rows.shape[1]), rows.t(), rstd, beta=share, alpha=-share
    )
    # Of rows with infinities or NaN there are no means; others are encoded.
    return means.nan_to_num_(0.0, 0.0, 0.0).to(dtype).view(shape)


def layer_norm(input, shape, weight, bias, eps, quantizer):
    """Layer normalisation whose normalised value is kept as codes.

    The output, mean and variance are exact. The gradients of weight and bias
    are unbiased, being linear in the normalised value; that of the input is
    quadratic in it and has a bias of second order, the variance of the
    rounding noise over the number of elements that are normalised together.

    The means of channels over all rows are kept in float32, and codes of the
    rest. Layers that read the output share them.

    Args:
        input (Tensor[*, *shape]): float32, float16 or bfloat16; computed in
            float32 where autocast says so, but kept as it is.
        shape (Sequence[int]): Shape of what is normalised together.
        weight (Tensor[*shape], optional): Scale.
        bias (Tensor[*shape], optional): Shift.
        eps (float): Added to the variance.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*, *shape]: The output.

    Raises:
        RuntimeError: If the shapes do not fit, as torch's function.
    """
    return _normalise(input, shape, weight, bias, eps, quantizer, _LAYER_NORM)


def rms_norm(input, shape, weight, eps, quantizer):
    """RMS normalisation whose normalised value is kept as codes.

    It is a layer normalisation with means and shifts of 0, and its output is
    exact; for gradients and payload see :func:`layer_norm`.

    Args:
        input (Tensor[*, *shape]): As for :func:`layer_norm`.
        shape (Sequence[int]): Shape of what is normalised together.
        weight (Tensor[*shape], optional): Scale, of the input's dtype unless
            autocast casts both.
        eps (float, optional): Added to the mean square. None stands for that
            of torch.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*, *shape]: The output.

    Raises:
        RuntimeError: If the shapes do not fit, as torch's function.
    """
    return _normalise(input, shape, weight, None, eps, quantizer, _RMS_NORM)


def _normalise(input, shape, weight, bias, eps, quantizer, kind):
    made = []
    output = _LayerNorm.apply(
        input,
        weight,
        bias,
        full_dtype(input),
        tuple(shape),
        eps,
        quantizer,
        made,
        kind,
    )
    if made and made[0].format.size == output.shape:
        quantizer.cache.put(output, made[0])
    return output
