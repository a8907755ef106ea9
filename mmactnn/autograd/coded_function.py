"""Autograd functions of other packages with one saved tensor as codes."""

import weakref

from torch.autograd import Function

from ..codes.calls import Call
from .context import StandInContext
from .double_backward import first_order_only


class _CodedFunction(Function):
    @staticmethod
    def forward(ctx, function, position, quantizer, *args):
        inner = StandInContext(ctx.needs_input_grad[3:])
        output = function.forward(inner, *args)
        others = list(inner.saved_tensors)
        inner.saved_tensors = ()
        coded = others.pop(position)
        ctx.format, kept, _ = quantizer.keep_shared(args[0], coded, True)
        ctx.function, ctx.position, ctx.inner = function, position, inner
        ctx.count = len(others)
        ctx.save_for_backward(*others, *kept)
        ctx.adaptive = quantizer.layer_bits
        ctx.source = weakref.ref(args[0])
        if quantizer.meter is not None:
            quantizer.record(kept, Call(coded, output))
        return output

    @staticmethod
    @first_order_only('QFunction')
    def backward(ctx, grad_output):
        saved = ctx.saved_tensors
        others, kept = list(saved[: ctx.count]), saved[ctx.count :]
        others.insert(ctx.position, ctx.format.payload(*kept).unpack())
        inner, ctx.inner = ctx.inner, None
        inner.saved_tensors = tuple(others)
        grads = ctx.function.backward(inner, grad_output)
        # Another backward pass of the same graph starts from here.
        inner.saved_tensors = ()
        ctx.inner = inner
        return None, None, None, *grads


def coded_function(function, position, quantizer, *args):
    """Run an autograd function with its input kept as codes.

    For functions of one output with gradients that are linear in the saved
    input, such as those of a deformable convolution: the gradients that do
    not depend on it are exact, the others unbiased. All else that the
    function saves is kept as it is.

    Args:
        function (type): Subclass of ``torch.autograd.Function`` with a
            context.
        position (int): Position of the input among the tensors that the
            function saves.
        quantizer (LayerQuantizer): Settings of the layer.
        *args (Any): Arguments of the function, all of its positional ones;
            the input, of float32, float16 or bfloat16, first.

    Returns:
        Tensor[*]: The output.
    """
    return _CodedFunction.apply(function, position, quantizer, *args)
