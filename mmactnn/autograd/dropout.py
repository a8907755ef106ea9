"""Dropout that keeps a seed."""

import torch
from torch.autograd import Function

from .. import ops
from ..codes.calls import Call
from ..ops.capture import is_capturing
from .double_backward import linear_map
from .in_place import finish, may_overwrite
from .placeholders import meta_tensor


class _Dropout(Function):
    @staticmethod
    def forward(ctx, input, inplace, p, seed, offset_tensor):
        drop = ops.dropout_ if may_overwrite(input, inplace) else ops.dropout
        seen = drop(input, p, seed, offset_tensor=offset_tensor)
        # Random bits are in the order of the dense tensor that the kernel
        # read.
        ctx.p, ctx.seed, ctx.stride = p, seed, seen.stride()
        ctx.save_for_backward(offset_tensor)
        return finish(ctx, input, seen, inplace)

    @staticmethod
    def backward(ctx, grad_output):
        (offset_tensor,) = ctx.saved_tensors
        p, seed, stride = ctx.p, ctx.seed, ctx.stride

        def drop(grad):
            grad = ops.layout.with_strides(grad, stride)
            return ops.dropout(grad, p, seed, offset_tensor=offset_tensor)

        return linear_map(drop, drop, grad_output), *[None] * 4


class _FeatureDropout(Function):
    @staticmethod
    def forward(ctx, input, inplace, p, seed, offset_tensor):
        noise = _noise(input, p, seed, offset_tensor)
        ctx.p, ctx.seed = p, seed
        ctx.save_for_backward(offset_tensor)
        if not inplace:
            return input * noise
        ctx.mark_dirty(input)
        return input.mul_(noise)

    @staticmethod
    def backward(ctx, grad_output):
        (offset_tensor,) = ctx.saved_tensors
        p, seed = ctx.p, ctx.seed

        def drop(grad):
            return grad * _noise(grad, p, seed, offset_tensor)

        return linear_map(drop, drop, grad_output), *[None] * 4


def _noise(input, p, seed, offset_tensor):
    """A factor for each channel of each sample."""
    ones = torch.ones(_features(input), device=input.device)
    return ops.dropout(ones, p, seed, offset_tensor=offset_tensor).to(
        input.dtype
    )


def _features(input):
    """Shape of one number for each channel of each sample."""
    return [*input.shape[:2], *[1] * (input.dim() - 2)]


def dropout(input, p, inplace, quantizer):
    """Dropout whose backward pass regenerates the mask.

    The seed is drawn from torch's default generator of the CPU, not from the
    layer's ``RoundingGenerator``: a checkpointed block runs twice with
    torch's random state restored in between, and has to drop the same
    elements both times. Rounding may differ between the two runs; a mask may
    not. The CPU's generator is read without waiting for a GPU.

    A CUDA graph keeps the seed. Its replays differ by an offset that they
    draw from torch's generator of the GPU.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16.
        p (float): Probability to drop an element, in (0, 1).
        inplace (bool): Whether to overwrite the input.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*]: The output.
    """
    # torch keeps the factors, or a mask where it has a fused kernel.
    fused = input.is_cuda and not inplace
    dtype = torch.bool if fused else input.dtype
    _note(quantizer, input, input.shape, dtype)
    return _Dropout.apply(input, inplace, p, *_draw(input))


def feature_dropout(input, p, inplace, quantizer):
    """Dropout of whole channels of samples, else as :func:`dropout`.

    Args:
        input (Tensor[N, C, *]): Any floating-point dtype.
        p (float): Probability to drop a channel of a sample, in (0, 1).
        inplace (bool): Whether to overwrite the input.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, C, *]: The output.
    """
    _note(quantizer, input, _features(input), input.dtype)
    return _FeatureDropout.apply(input, inplace, p, *_draw(input))


def _note(quantizer, input, size, dtype):
    """Record the mask that torch would keep, while a meter counts."""
    if (
        quantizer.meter is not None
        and torch.is_grad_enabled()
        and input.requires_grad
    ):
        quantizer.record((), Call(input, mask=meta_tensor(size, dtype)))


def _draw(input):
    """Draw seed and offset tensor."""
    seed = torch.randint(1 << 62, (), device='cpu').item()
    if input.is_cuda and is_capturing():
        return seed, torch.randint(1 << 62, (1,), device=input.device)
    return seed, None
