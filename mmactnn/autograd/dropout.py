"""Dropout that keeps a seed."""

import torch
from torch.autograd import Function

from .. import ops
from ..capture import is_capturing
from .in_place import finish, may_overwrite
from .stand_in import counted


class _Dropout(Function):
    @staticmethod
    def forward(ctx, input, inplace, p, seed, count):
        drop = ops.dropout_ if may_overwrite(input, inplace) else ops.dropout
        seen = drop(input, p, seed, count=count)
        # The order of the random bits is that of the dense tensor the kernel
        # saw.
        ctx.p, ctx.seed, ctx.stride = p, seed, seen.stride()
        ctx.save_for_backward(count)
        return finish(ctx, input, seen, inplace)

    @staticmethod
    def backward(ctx, grad_output):
        grad = ops.layout.with_strides(grad_output, ctx.stride)
        (count,) = ctx.saved_tensors
        grad_input = _Dropout.apply(grad, False, ctx.p, ctx.seed, count)
        return grad_input, *[None] * 4


def dropout(input, p, inplace, quantizer):
    """Dropout whose backward makes the same mask again.

    The seed is drawn from torch's default generator of the CPU, not from the
    layer's ``RoundingGenerator``: a checkpointed block runs twice with
    torch's random state put back in between, and has to drop the same
    elements both times. Rounding may differ between the two runs; a mask may
    not. The CPU's generator is read without waiting for a GPU.

    A CUDA graph holds on to the seed. What differs between its replays is a
    number that they draw from torch's generator of the GPU.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16.
        p (float): Probability to drop an element, in (0, 1).
        inplace (bool): Whether to overwrite the input.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*]: The output.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        # torch keeps the factors, or a mask where it has a kernel of its own.
        fused = input.is_cuda and not inplace
        exact = counted(input.shape, torch.bool if fused else input.dtype)
        quantizer.note(kept=(), exact=(exact,))
    seed = torch.randint(1 << 62, (), device='cpu').item()
    count = None
    if input.is_cuda and is_capturing():
        count = torch.randint(1 << 62, (1,), device=input.device)
    return _Dropout.apply(input, inplace, p, seed, count)
