"""Convolutions, each with the normalisation and ReLU behind it, as one.

What a layer costs on the host, small tensors feel: a node of the graph, a call
of a module and of a function. A chain has one node for all of its layers, and
one call of an op in each direction.
"""

from typing import NamedTuple

import torch
from torch.autograd import Function

from .. import ops
from ..payload import PayloadFormat, share
from .double_backward import first_order_only


class Chain(NamedTuple):
    """The layers of a chain, for one call.

    Attributes:
        parameters (list[Tensor | None]): See
            :func:`mmactnn.ops.conv_chain`, but in the dtypes that they have.
        buffers (list[Tensor | None]): See there.
        plan (list[int]): See there.
        settings (list[float]): See there.
        rounded (int): How many tensors are rounded.
        quantizer (LayerQuantizer): Settings of the first convolution.
        output (tuple[str, int, int], optional): Kind, bits and group size of
            the payload that the output has; None if it has none.
    """

    parameters: list
    buffers: list
    plan: list
    settings: list
    rounded: int
    quantizer: object
    output: tuple | None


class _Chain(Function):
    @staticmethod
    def forward(ctx, input, residual, dtype, layers, made, *parameters):
        x = input if dtype is None else input.to(dtype)
        quantizer = layers.quantizer
        format, codes, ctx.watch = quantizer.keep_shared(input, x, True)
        cast = _cast(parameters, x.dtype)
        seed, offset, _ = quantizer.generator.next(x.device, layers.rounded)
        output, kept, ctx.layouts = ops.conv_chain(
            x,
            residual,
            cast,
            layers.buffers,
            layers.plan,
            layers.settings,
            seed=seed,
            offset=offset,
        )
        if layers.output is not None:
            kind, bits, group_size = layers.output
            tensors = kept[-2:] + (cast[-2:] if kind == 'split' else [])
            out = PayloadFormat.of(output, bits, group_size, kind)
            made.append(out.payload(*tensors))
        ctx.save_for_backward(*parameters, *codes, *kept)
        ctx.counts = len(parameters), len(codes)
        ctx.format, ctx.plan = format, layers.plan
        ctx.adds = residual is not None
        return output

    @staticmethod
    @first_order_only('A block that is fused')
    def backward(ctx, grad_output):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        parameters, codes = ctx.counts
        kept = parameters + codes
        codes = saved[parameters:kept]
        grad_input, grad_residual, first, *grads = ops.conv_chain_backward(
            grad_output,
            (ctx.format, codes),
            _cast(saved[:parameters], ctx.format.dtype),
            saved[kept:],
            ctx.layouts,
            ctx.plan,
            needs[-parameters:],
            needs[0],
            ctx.adds,
            ctx.watch is not None,
        )
        if ctx.watch is not None:
            payload = ctx.format.payload(*codes)
            fan = saved[0][0].numel()
            ctx.watch.linear(payload, first, grads[0], fan)
        return grad_input, grad_residual, None, None, None, *grads


def _cast(parameters, dtype):
    """Those of convolutions in some dtype, the others in float32."""
    return [
        tensor
        if tensor is None or tensor.dtype == wanted
        else tensor.to(wanted)
        for tensor, wanted in zip(
            parameters,
            (dtype, dtype, torch.float32, torch.float32)
            * (len(parameters) // ops.PARAMETERS),
        )
    ]


def chain(input, residual, dtype, layers):
    """Convolutions, normalisations and ReLUs, one behind another.

    The output and all gradients are those of the layers, called one by one,
    but that the gradient of the output lives until the backward pass of the
    last layer has ended.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16; under autocast
            it is cast to autocast's dtype.
        residual (Tensor[N, O, *], optional): Added after the last
            normalisation, of the dtype and shape of the output; with ReLU
            only.
        dtype (torch.dtype, optional): That of autocast, see
            :func:`mmactnn.autograd.autocast.lower_dtype`.
        layers (Chain): The layers.

    Returns:
        Tensor[N, O, *]: The output.
    """
    made = []
    output = _Chain.apply(
        input, residual, dtype, layers, made, *layers.parameters
    )
    for payload in made:
        share(output, payload)
    return output
