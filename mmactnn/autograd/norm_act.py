"""Batch normalisation, residual addition and ReLU as one, with one payload."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import Function

from .. import ops
from ..payload import PayloadFormat, share
from .double_backward import first_order_only
from .sync_batch_norm import global_statistics, update_running


class Statistics(NamedTuple):
    """Where a normalisation gets mean and variance from.

    Attributes:
        running_mean (Tensor[C], optional): Updated in place with those of the
            batch, or used in their place.
        running_var (Tensor[C], optional): Likewise.
        of_batch (bool): Whether to normalise with those of the batch.
        momentum (float): Weight of the batch in the running ones.
        eps (float): Added to the variance.
        group (ProcessGroup, optional): Processes whose parts make up the
            batch. Defaults to this one.
    """

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    of_batch: bool
    momentum: float
    eps: float
    group: object = None

    def compute(self, input):
        """Mean and inverse standard deviation of each channel.

        Args:
            input (Tensor[N, C, *]): What is to be normalised.

        Returns:
            tuple[Tensor[C], Tensor[C], Tensor]: float32; and the number of
            values of a channel, an int or Tensor[1].
        """
        running = self.running_mean, self.running_var
        if not self.of_batch:
            mean, var = (r.float() for r in running)
            return mean, torch.rsqrt(var + self.eps), 1
        if self.group is None:
            mean, _, invstd = ops.channel_stats(
                input, self.eps, self.momentum, *running
            )
            return mean, invstd, input.numel() // input.shape[1]
        mean, var, count = global_statistics(input, self.group)
        if running[0] is not None:
            update_running(running, mean, var, count, self.momentum)
        return mean, torch.rsqrt(var + self.eps), count


class _NormAct(Function):
    @staticmethod
    def forward(
        ctx, input, residual, weight, bias, statistics, relu, quantizer, made
    ):
        x = ops.layout.dense_channels(input)
        mean, invstd, count = statistics.compute(x)
        w, b = (t if t is None else t.float() for t in (weight, bias))
        added = residual
        if residual is not None:
            added = ops.layout.with_strides(residual, x.stride())
        kind = 'split' if relu and residual is None else 'plain'
        bits = quantizer.fused_bits
        norm = PayloadFormat.of(
            x, getattr(bits, kind), quantizer.group_size, kind
        )
        act = norm._replace(bits=bits.zeroed, kind='zeroed')
        seed, offset = quantizer.generator.next()
        output, codes, ranges, act_codes, act_ranges = ops.norm_act(
            x,
            added,
            mean,
            invstd,
            w,
            b,
            relu,
            norm.bits,
            act.bits if residual is not None else 0,
            quantizer.group_size,
            seed=seed,
            offset=offset,
        )
        # The layers behind need no more of the output than is here already.
        if residual is not None:
            made.append(act.payload(act_codes, act_ranges))
        elif relu:
            made.append(norm.payload(codes, ranges, w, b))

        ctx.norm, ctx.act, ctx.relu = norm, act, relu
        ctx.adds, ctx.statistics, ctx.count = (
            residual is not None,
            statistics,
            count,
        )
        kept = codes, ranges, act_codes, act_ranges
        ctx.save_for_backward(*kept, weight, invstd)
        exact = [input, mean, invstd]
        if relu:
            exact.append(output)
        quantizer.note(kept=kept, exact=tuple(exact))
        return output

    @staticmethod
    @first_order_only('A normalisation that is fused with what follows')
    def backward(ctx, grad_output):
        codes, ranges, act_codes, _, weight, invstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        norm, statistics = ctx.norm, ctx.statistics
        grad = ops.layout.with_strides(grad_output, norm.stride)
        format = norm.bits, norm.group_size
        masks = ctx.relu and not ctx.adds
        if ctx.adds:
            grad, sums = ops.norm_add_grad_sums(
                grad,
                codes,
                ranges,
                act_codes,
                norm.bits,
                ctx.act.bits,
                norm.group_size,
            )
        else:
            sums = ops.norm_grad_sums(grad, codes, ranges, *format, masks)
        grad_input = None
        if needs[0]:
            if statistics.of_batch:
                total = sums
                if statistics.group is not None:
                    # The gradients of weight and bias stay those of this
                    # process: the optimiser's all-reduce adds them up.
                    total = sums.clone()
                    dist.all_reduce(total, group=statistics.group)
                means = total / ctx.count
            else:
                means = torch.zeros_like(sums)
            scale = invstd if weight is None else invstd * weight
            grad_input = ops.norm_grad_input(
                grad, codes, ranges, scale.float(), means, *format, masks
            )
        return (
            grad_input,
            grad if needs[1] else None,
            sums[1] if needs[2] else None,
            sums[0] if needs[3] else None,
            *[None] * 4,
        )


def norm_act(input, residual, weight, bias, statistics, relu, quantizer):
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
        statistics (Statistics): Where mean and variance come from.
        relu (bool): Whether to rectify.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, C, *]: The output.
    """
    made = []
    output = _NormAct.apply(
        input, residual, weight, bias, statistics, relu, quantizer, made
    )
    for payload in made:
        share(output, payload)
    return output
