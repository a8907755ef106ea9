"""Fused batch normalisation, residual addition and ReLU, with one payload."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import Function

from .. import ops
from ..codes.calls import Call
from ..codes.payload import PayloadFormat
from .double_backward import first_order_only
from .placeholders import meta_tensor
from .sync_batch_norm import global_statistics, update_running


class _Record(NamedTuple):
    """State of a normalisation for its backward pass, besides tensors.

    Attributes:
        norm (PayloadFormat): Format of the normalised input's payload.
        act (PayloadFormat, optional): Format of the output's payload, after
            an addition.
        relu (bool): Whether the output was rectified.
        group (ProcessGroup, optional): See :func:`norm_act`.
        count (Tensor[1], optional): Values a channel, over a process group.
        use_batch_stats (bool): Whether the statistics were those of the
            batch.
    """

    norm: PayloadFormat
    act: PayloadFormat | None
    relu: bool
    group: object
    count: torch.Tensor | None
    use_batch_stats: bool


class NormCodes(NamedTuple):
    """Codes of a normalised value that what follows reads, too.

    Attributes:
        format (PayloadFormat): Their format.
        operands (tuple[Tensor | None]): Codes, ranges, and float32 weight and
            bias of the normalisation.
    """

    format: PayloadFormat
    operands: tuple


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
        shared_bits=None,
    ):
        x = ops.layout.dense_channels(input)
        adds = residual is not None
        kind = 'split' if relu and not adds else 'plain'
        bits = quantizer.fused_bits
        draw = quantizer.generator.next(x.device)
        random, drawn = quantizer.random(draw), quantizer.drawn_bits(draw)
        if shared_bits is not None:
            # Not rotated, also where the level is: see `smooth`.
            random = dict(random, rotated=False)
            drawn = ops.DrawnBits.of('dither', *draw)
        norm = PayloadFormat.of(
            x,
            shared_bits or getattr(bits, kind),
            quantizer.group_size,
            kind,
            drawn,
        )
        inplace = inplace and group is None and x is input
        read = None
        if quantizer.meter is not None:
            # torch keeps an input that is overwritten here.
            read = meta_tensor(x.shape, x.dtype) if inplace else input
        tensors = x, residual, _float(weight), _float(bias)
        arguments = (
            relu,
            norm.bits,
            bits.zeroed if adds else 0,
            quantizer.group_size,
        )
        count = None
        if group is not None:
            output, invstd, count, codes = _normalise_global_batch(
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
            act = norm._replace(
                bits=bits.zeroed,
                kind='zeroed',
                drawn=drawn and drawn.second(),
            )
            payload = act.make(*codes[2:])
        elif relu:
            payload = norm.make(*codes, *tensors[2:])
        elif shared_bits is not None:
            payload = NormCodes(norm, (*codes, *tensors[2:]))
        if quantizer.meter is not None:
            mean = meta_tensor(invstd.shape, invstd.dtype)
            call = Call(read, output, statistics=(invstd, mean))
            # ReLU keeps its output.
            quantizer.record(tuple(codes), call, also=(output,) * relu)
        ctx.record = _Record(
            norm, act, relu, group, count, settings.use_batch_stats
        )
        if output is input:
            ctx.mark_dirty(input)
        # Layers that read the output share this payload.
        if payload is not None:
            made.append(payload)
        # Those of the normalised input tell those of the output.
        ctx.save_for_backward(weight, invstd, *codes, *norm.bits_to_save)
        return output

    @staticmethod
    @first_order_only('A normalisation that is fused with what follows')
    def backward(ctx, grad_output):
        weight, invstd, *kept = ctx.saved_tensors
        record, needs = ctx.record, ctx.needs_input_grad
        norm, (codes, ranges, *act) = record.norm.split_saved(kept)
        record = record._replace(norm=norm)
        grad = ops.layout.with_strides(grad_output, record.norm.stride)
        compute = (
            _gradients if record.group is None else _global_batch_gradients
        )
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
        return *wanted, *[None] * 7


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
        record.use_batch_stats,
        needs_input,
        norm.bits,
        record.act.bits if act else 0,
        norm.group_size,
        drawn=norm.drawn,
    )


def _normalise_global_batch(tensors, settings, group, arguments, random):
    """Forward pass with statistics over several processes."""
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


def _global_batch_gradients(
    record, grad, codes, ranges, act, weight, invstd, needs_input
):
    """Gradients with statistics over several processes."""
    bits, group_size = record.norm.bits, record.norm.group_size
    random = dict(drawn=record.norm.drawn)
    masks = record.relu and not act
    if act:
        grad, sums = ops.norm_add_grad_sums(
            grad,
            codes,
            ranges,
            act[0],
            bits,
            record.act.bits,
            group_size,
            **random,
        )
    else:
        sums = ops.norm_grad_sums(
            grad, codes, ranges, bits, group_size, masks, **random
        )
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
            **random,
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
    """Batch normalisation with optional residual addition and ReLU.

    The backward passes of all three, and of the layers that read the output,
    use the codes of the normalised input and, with a residual, of the output.
    The mask of ReLU is kept exactly. The gradients of weight and bias are
    unbiased, and so is that of the weight of a layer that reads the output;
    the gradient of the input has the bias of second order of
    :func:`mmactnn.autograd.batch_norm`.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16.
        residual (Tensor[N, C, *], optional): Added to the normalised input;
            with ReLU only.
        weight (Tensor[C], optional): Scale.
        bias (Tensor[C], optional): Shift.
        settings (NormSettings): Statistics and constants.
        relu (bool): Whether to rectify.
        quantizer (LayerQuantizer): Settings of the layer.
        group (ProcessGroup, optional): Processes whose parts make up the
            batch. Defaults to this one.
        inplace (bool, optional): Whether the output may overwrite the input,
            where its layout allows. Defaults to False.

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


def norm_for_smooth(
    input, weight, bias, settings, bits, quantizer, group=None, inplace=False
):
    """Batch normalisation whose codes serve a smooth activation, too.

    Args:
        input (Tensor[N, C, *]): See :func:`norm_act`.
        weight (Tensor[C], optional): See there.
        bias (Tensor[C], optional): See there.
        settings (NormSettings): See there.
        bits (int): Bits of the codes, which have dither.
        quantizer (LayerQuantizer): See there.
        group (ProcessGroup, optional): See there.
        inplace (bool, optional): See there.

    Returns:
        tuple[Tensor[N, C, *], NormCodes]: The output, and its codes.
    """
    made = []
    output = _NormAct.apply(
        input,
        None,
        weight,
        bias,
        settings,
        group,
        False,
        inplace,
        quantizer,
        made,
        bits,
    )
    return output, made[0]
