"""Batch normalisation, residual addition and ReLU as one, with one payload."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import Function

from .. import ops
from ..codes.calls import Call
from ..codes.payload import PayloadFormat
from .double_backward import first_order_only
from .stand_in import counted
from .sync_batch_norm import global_statistics, update_running


class _Record(NamedTuple):
    """What the backward pass of a normalisation knows besides tensors.

    Attributes:
        norm (PayloadFormat): Of the normalised input.
        act (PayloadFormat, optional): Of the output, after an addition.
        relu (bool): Whether the output was rectified.
        group (ProcessGroup, optional): See :func:`norm_act`.
        count (Tensor[1], optional): Values a channel, of a group.
        of_batch (bool): Whether the statistics were the batch's.
    """

    norm: PayloadFormat
    act: PayloadFormat | None
    relu: bool
    group: object
    count: torch.Tensor | None
    of_batch: bool


class _NormAct(Function):
    @staticmethod
    def forward(
        ctx,
        input,
        residual,
        weight,
        bias,
        settings,
        group,
        relu,
        inplace,
        quantizer,
        made,
    ):
        x = ops.layout.dense_channels(input)
        adds = residual is not None
        kind = 'split' if relu and not adds else 'plain'
        bits = quantizer.fused_bits
        norm = PayloadFormat.of(
            x, getattr(bits, kind), quantizer.group_size, kind
        )
        inplace = inplace and group is None and x is input
        read = None
        if quantizer.meter is not None:
            # What is written over here, torch keeps.
            read = counted(x.shape, x.dtype) if inplace else input
        random = quantizer.generator.next(x.device)._asdict()
        tensors = x, residual, _float(weight), _float(bias)
        arguments = (
            relu,
            norm.bits,
            bits.zeroed if adds else 0,
            quantizer.group_size,
        )
        count = None
        if group is not None:
            output, invstd, count, codes = _normalise_batch_of_all(
                tensors, settings, group, arguments, random
            )
        elif inplace:
            output = input
            invstd, codes = ops.batch_norm_act_(
                *tensors, settings, *arguments, **random
            )
        else:
            output, invstd, codes = ops.batch_norm_act(
                *tensors, settings, *arguments, **random
            )
        act = payload = None
        if adds:
            act = norm._replace(bits=bits.zeroed, kind='zeroed')
            payload = act.payload(*codes[2:])
        elif relu:
            payload = norm.payload(*codes, *tensors[2:])
        if quantizer.meter is not None:
            mean = counted(invstd.shape, invstd.dtype)
            call = Call(read, output, statistics=(invstd, mean))
            # ReLU keeps its output.
            quantizer.note(tuple(codes), call, also=(output,) * relu)
        ctx.record = _Record(norm, act, relu, group, count, settings.of_batch)
        if output is input:
            ctx.mark_dirty(input)
        # The layers behind need no more of the output than is here already.
        if payload is not None:
            made.append(payload)
        ctx.save_for_backward(weight, invstd, *codes)
        return output

    @staticmethod
    @first_order_only('A normalisation that is fused with what follows')
    def backward(ctx, grad_output):
        weight, invstd, codes, ranges, *act = ctx.saved_tensors
        record, needs = ctx.record, ctx.needs_input_grad
        grad = ops.layout.with_strides(grad_output, record.norm.stride)
        compute = _gradients if record.group is None else _gradients_of_all
        (grad_bias, grad_weight), grads = compute(
            record, grad, codes, ranges, act, _float(weight), invstd, needs[0]
        )
        grads = (
            grads[0] if needs[0] else None,
            grads[-1] if act else None,
            grad_weight,
            grad_bias,
        )
        wanted = [
            grad if needed else None for grad, needed in zip(grads, needs)
        ]
        return *wanted, *[None] * 6


def _float(vector):
    if vector is None or vector.dtype == torch.float32:
        return vector
    return vector.float()


def _gradients(record, grad, codes, ranges, act, weight, invstd, needs_input):
    norm = record.norm
    return ops.batch_norm_act_backward(
        grad,
        codes,
        ranges,
        act[0] if act else None,
        weight,
        invstd,
        record.relu,
        record.of_batch,
        needs_input,
        norm.bits,
        record.act.bits if act else 0,
        norm.group_size,
    )


def _normalise_batch_of_all(tensors, settings, group, arguments, random):
    """The forward pass where several processes make up the batch."""
    x, residual, weight, bias = tensors
    mean, var, count = global_statistics(x, group)
    running = settings.running_mean, settings.running_var
    if running[0] is not None:
        update_running(running, mean, var, count, settings.momentum)
    if settings.num_batches_tracked is not None:
        settings.num_batches_tracked.add_(1)
    invstd = torch.rsqrt(var + settings.eps)
    output, *codes = ops.norm_act(
        x, residual, mean, invstd, weight, bias, *arguments, **random
    )
    return output, invstd, count, codes[: 2 if residual is None else 4]


def _gradients_of_all(
    record, grad, codes, ranges, act, weight, invstd, needs_input
):
    """The gradients where several processes make up the batch."""
    bits, group_size = record.norm.bits, record.norm.group_size
    masks = record.relu and not act
    if act:
        grad, sums = ops.norm_add_grad_sums(
            grad, codes, ranges, act[0], bits, record.act.bits, group_size
        )
    else:
        sums = ops.norm_grad_sums(grad, codes, ranges, bits, group_size, masks)
    grads = [grad] if act else []
    if needs_input:
        # The gradients of weight and bias stay those of this process: the
        # optimiser's all-reduce adds them up.
        total = sums.clone()
        dist.all_reduce(total, group=record.group)
        scale = invstd if weight is None else invstd * weight
        grad_input = ops.norm_grad_input(
            grad,
            codes,
            ranges,
            scale,
            total / record.count,
            bits,
            group_size,
            masks,
        )
        grads.insert(0, grad_input)
    return sums.unbind(), grads


def norm_act(
    input,
    residual,
    weight,
    bias,
    settings,
    relu,
    quantizer,
    group=None,
    inplace=False,
):
    """Batch normalisation, then maybe an addition, then maybe ReLU.

    The backward pass of all of them, and that of the layers that read the
    output, comes from the codes of the normalised input and, with a residual,
    of the output. Whether ReLU lets a gradient pass is kept exactly. The
    gradients of weight and bias are unbiased, and so is that of the weight of
    a layer that reads the output; that of the input has the bias of second
    order of :func:`mmactnn.autograd.batch_norm`.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16.
        residual (Tensor[N, C, *], optional): Added to what is normalised;
            with ReLU only.
        weight (Tensor[C], optional): Scale.
        bias (Tensor[C], optional): Shift.
        settings (NormSettings): Where mean and variance come from.
        relu (bool): Whether to rectify.
        quantizer (LayerQuantizer): Settings of the layer.
        group (ProcessGroup, optional): Processes whose parts make up the
            batch. Defaults to this one.
        inplace (bool, optional): Whether nobody needs the input any more, so
            that the output may be written over it where its layout allows.
            Defaults to False.

    Returns:
        Tensor[N, C, *]: The output.
    """
    made = []
    output = _NormAct.apply(
        input,
        residual,
        weight,
        bias,
        settings,
        group,
        relu,
        inplace,
        quantizer,
        made,
    )
    for payload in made:
        quantizer.cache.put(output, payload)
    return output
