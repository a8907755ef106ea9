"""Batch normalisation over several processes, its input kept as codes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import Function

from ..codes.calls import Call
from ..ops.channels import channel_shape, dims_but_channels
from .autocast import cast
from .double_backward import first_order_only


def global_statistics(input, group):
    """Mean, biased variance and number of values of each channel.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979, over the processes at once.

    Args:
        input (Tensor[N, C, *]): This process's part; N may be 0.
        group (ProcessGroup): The processes.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Mean (Tensor[C]), variance (Tensor[C])
        and count (Tensor[1]); float32, of a float64 input float64. Zeros if
        no process has any sample.
    """
    channels = input.size(1)
    dtype = torch.promote_types(input.dtype, torch.float32)
    local = input.new_zeros(2 * channels + 1, dtype=dtype)
    if input.numel():
        var, mean = torch.var_mean(
            input.to(dtype), dims_but_channels(input), correction=0
        )
        count = input.numel() // channels
        local = torch.cat([mean, var, mean.new_full((1,), count)])
    parts = [
        torch.empty_like(local) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, local, group=group)
    means, variances, counts = torch.stack(parts).split(
        [channels, channels, 1], dim=1
    )
    total = counts.sum(0)
    shares = counts / total.clamp(min=1)
    mean = (means * shares).sum(0)
    spread = variances + (means - mean) ** 2
    return mean, (spread * shares).sum(0), total


def update_running(running, mean, var, count, momentum):
    """Move running statistics towards those of a batch.

    Args:
        running (tuple[Tensor[C], Tensor[C]]): Mean and variance, of any
            dtype, updated in place.
        mean (Tensor[C]): Mean of the batch.
        var (Tensor[C]): Biased variance of the batch.
        count (Tensor[1]): Values a channel of the batch. An empty batch
            changes nothing, as in torch.
        momentum (float): Weight of the batch.
    """
    momentum = momentum * count.clamp(max=1)
    for statistic, batch in zip(running, (mean, var * (count / (count - 1)))):
        dtype = statistic.dtype
        statistic.lerp_(batch.to(dtype), momentum.to(dtype))


class _SyncBatchNorm(Function):
    @staticmethod
    def forward(
        ctx,
        input,
        weight,
        bias,
        running_mean,
        running_var,
        momentum,
        eps,
        group,
        quantizer,
    ):
        mean, var, count = global_statistics(input, group)
        if running_mean is not None:
            running = running_mean, running_var
            update_running(running, mean, var, count, momentum)
        # The kernels take parameters and statistics of one dtype.
        w, b = cast(mean.dtype, weight, bias)
        output = F.batch_norm(input, mean, var, w, b, False, 0.0, eps)
        needed = any(ctx.needs_input_grad[:2])
        statistics = (mean, var, count)
        if quantizer.exact:
            ctx.format, kept = None, (input,) * needed
        else:
            ctx.format, kept = quantizer.keep(input, needed=needed)
            if quantizer.meter is not None:
                quantizer.record(
                    kept, Call(input, output, statistics=statistics)
                )
        ctx.probe = quantizer.probe_norm(input)
        ctx.adaptive = quantizer.layer_bits
        ctx.eps, ctx.group = eps, group
        ctx.save_for_backward(weight, *statistics, *kept)
        return output

    @staticmethod
    @first_order_only(
        'QSyncBatchNorm',
        unless=lambda ctx: len(ctx.saved_tensors) == 4,
    )
    def backward(ctx, grad_output):
        weight, mean, var, count, *kept = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        nothing = [None] * 6
        shape = channel_shape(grad_output)
        dims = dims_but_channels(grad_output)
        dtype = mean.dtype
        grad_bias = grad_output.sum(dims, dtype=dtype)
        if not kept:
            return None, None, grad_bias if needs_bias else None, *nothing

        invstd = torch.rsqrt(var + ctx.eps)
        if ctx.format is None:
            x_hat = kept[0].to(dtype, copy=True)
        else:
            payload = ctx.format.payload(*kept)
            x_hat = payload.unpack().to(dtype)
        x_hat.sub_(mean.view(shape)).mul_(invstd.view(shape))
        grad_weight = (grad_output * x_hat).sum(dims, dtype=dtype)
        grad_input = None
        if needs_input:
            # The sums run over all processes, the gradients of weight and
            # bias over this one: the optimiser's all-reduce adds them up.
            sums = torch.stack([grad_bias, grad_weight])
            dist.all_reduce(sums, group=ctx.group)
            mean_grad, mean_grad_x_hat = sums / count.clamp(min=1)
            x_hat.mul_(mean_grad_x_hat.view(shape))
            x_hat.add_(mean_grad.view(shape)).sub_(grad_output)
            scale = invstd if weight is None else invstd * weight
            grad_input = x_hat.mul_(-scale.view(shape)).to(grad_output.dtype)
        if ctx.probe is not None:
            ctx.probe.norm(
                payload, grad_output, grad_input, grad_weight, weight, invstd
            )
        return (
            grad_input,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            *nothing,
        )


def sync_batch_norm(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    momentum,
    eps,
    group,
    quantizer,
):
    """Batch normalisation with the statistics of all processes.

    Args:
        input (Tensor[N, C, *]): This process's part; N may be 0.
        weight (Tensor[C], optional): Scale.
        bias (Tensor[C], optional): Shift.
        running_mean (Tensor[C], optional): Updated in place.
        running_var (Tensor[C], optional): Updated in place.
        momentum (float): Weight of the batch in the running statistics.
        eps (float): Added to the variance.
        group (ProcessGroup): The processes, over any backend.
        quantizer (LayerQuantizer): Settings of the layer; if exact, the input
            itself is kept.

    Returns:
        Tensor[N, C, *]: The output.
    """
    return _SyncBatchNorm.apply(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        momentum,
        eps,
        group,
        quantizer,
    )
