"""SiLU that keeps its derivative as codes."""

import weakref

import torch
import torch.nn.functional as F
from torch.autograd import Function

from ..codes.calls import Call
from .double_backward import first_order_only
from .placeholders import meta_tensor


class _SiLU(Function):
    @staticmethod
    def forward(ctx, input, inplace, composed, quantizer):
        one = torch.ones((), dtype=input.dtype, device=input.device)
        derivative = torch.ops.aten.silu_backward(
            one.expand(input.shape), input
        )
        # Rows of the payload are samples: a vector is one.
        rows = derivative.unsqueeze(0) if input.dim() < 2 else derivative
        ctx.format, kept = quantizer.keep(rows, needed=True)
        del derivative, rows
        ctx.shape = input.shape
        ctx.save_for_backward(*kept)

        ctx.source = weakref.ref(input)
        sigmoid = None
        if composed:
            sigmoid = torch.sigmoid(input)
            output = input * sigmoid
        else:
            output = F.silu(input, inplace)
        if inplace:
            ctx.mark_dirty(input)
        if quantizer.meter is not None:
            # In place, torch keeps a copy of the input.
            read = meta_tensor(input.shape, input.dtype) if inplace else input
            call = Call(read, output, sigmoid=sigmoid, inplace=inplace)
            quantizer.record(kept, call)
        return output

    @staticmethod
    @first_order_only('SiLU (QSiLU, QSwish)')
    def backward(ctx, grad_output):
        derivative = ctx.format.payload(*ctx.saved_tensors).unpack()
        derivative = derivative.view(ctx.shape)
        if derivative.stride() == grad_output.stride():
            return derivative.mul_(grad_output), None, None, None
        return grad_output * derivative, None, None, None


def silu(input, quantizer, inplace=False, composed=False):
    """``F.silu`` whose backward multiplies by a derivative from codes.

    The output is exact. The gradient of the input is linear in the rounded
    derivative, hence unbiased. Rounding the input instead would bias it, as
    the derivative is no linear function of the input.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16.
        quantizer (LayerQuantizer): Settings of the layer.
        inplace (bool, optional): Whether to overwrite the input. Defaults to
            False.
        composed (bool, optional): Whether to compute the output as
            ``input * torch.sigmoid(input)``, which differs in the last bits.
            Defaults to False.

    Returns:
        Tensor[*]: The output.
    """
    return _SiLU.apply(input, inplace, composed, quantizer)
