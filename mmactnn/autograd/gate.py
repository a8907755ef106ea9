"""Product with a gate that keeps the gated tensor as codes."""

import weakref

from torch.autograd import Function

from ..codes.calls import Call
from .double_backward import first_order_only


class _Gate(Function):
    @staticmethod
    def forward(ctx, input, gate, quantizer):
        needs_input, needs_gate = ctx.needs_input_grad[:2]
        ctx.format, kept, _ = quantizer.keep_shared(
            input, input, needed=needs_gate
        )
        ctx.adaptive = quantizer.layer_bits
        ctx.save_for_backward(gate, *kept)
        ctx.input_dtype = input.dtype
        ctx.source = weakref.ref(input)
        output = input * gate
        if quantizer.meter is not None:
            call = Call(
                input,
                output,
                gate,
                needs_input=needs_input,
                needs_weight=needs_gate,
            )
            quantizer.record(kept, call)
        return output

    @staticmethod
    @first_order_only('QGate', unless=lambda ctx: ctx.format is None)
    def backward(ctx, grad_output):
        gate, *kept = ctx.saved_tensors
        grad_input = grad_gate = None
        if ctx.needs_input_grad[1]:
            product = ctx.format.payload(*kept).unpack() * grad_output
            grad_gate = product.sum_to_size(gate.shape).to(gate.dtype)
            del product
        if ctx.needs_input_grad[0]:
            grad_input = (grad_output * gate).to(ctx.input_dtype)
        return grad_input, grad_gate, None


def gate(input, gate, quantizer):
    """``input * gate`` with the input kept as codes.

    The output and the gradient of the input are exact; the gradient of the
    gate is linear in the input, hence unbiased.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16.
        gate (Tensor[*]): Kept exactly; of a shape that broadcasts to the
            input's.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, *]: The output.
    """
    return _Gate.apply(input, gate, quantizer)
