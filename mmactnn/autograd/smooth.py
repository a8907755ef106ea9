"""Smooth activations that keep codes of their derivative or their input."""

import weakref

from torch.autograd import Function

from .. import ops
from ..codes.calls import Call
from ..codes.payload import PayloadFormat
from .double_backward import first_order_only, linear_map
from .placeholders import meta_tensor

# Fewest bits at which the second-order correction of a code of the input
# leaves a bias below a tenth of the error.
_MIN_JOINT_BITS = 3


class _CodedDerivative(Function):
    @staticmethod
    def forward(ctx, input, compute, smooth, quantizer, name):
        ctx.exact = smooth.bits is not None
        bits = quantizer.bits
        drawn, random = None, dict(seed=0)
        if ctx.exact:
            bits = smooth.bits
        else:
            draw = quantizer.generator.next(input.device)
            drawn, random = quantizer.drawn_bits(draw), draw._asdict()
        dense = ops.layout.dense(input)
        codes = ops.smooth_derivative(dense, smooth, bits, **random)
        ctx.format = PayloadFormat.of(
            dense, bits, quantizer.group_size, drawn=drawn, smooth=smooth
        )
        ctx.save_for_backward(codes, *ctx.format.bits_to_save)
        return _finish(ctx, input, compute, quantizer, name, (codes,))

    @staticmethod
    @first_order_only(lambda ctx: ctx.name, unless=lambda ctx: ctx.exact)
    def backward(ctx, grad_output):
        format, (codes,) = ctx.format.split_saved(ctx.saved_tensors)

        def multiply(grad):
            return ops.smooth_derivative_backward(
                ops.layout.with_strides(grad, format.stride),
                codes,
                format.smooth,
                format.bits,
                drawn=format.drawn,
            )

        grad_input = linear_map(multiply, multiply, grad_output)
        return grad_input, None, None, None, None


class _CodedInput(Function):
    @staticmethod
    def forward(ctx, input, compute, smooth, quantizer, name, made):
        # Rows of the payload are samples: a vector is one.
        rows = input if input.dim() > 1 else input.reshape(1, -1)
        rows = ops.layout.dense_rows(rows)
        draw = quantizer.generator.next(input.device)
        bits, group_size = quantizer.bits, quantizer.group_size
        # Not rotated, also where the level is: the variance of dither is
        # known, and the same for all elements of a group.
        codes = ops.quantize(rows, bits, group_size, **draw._asdict())
        payload = PayloadFormat.of(
            rows,
            bits,
            group_size,
            'smooth',
            ops.DrawnBits.of('dither', *draw),
            smooth,
        ).make(*codes)
        made.append(payload)
        ctx.format, ctx.size = payload.format, input.shape
        ctx.save_for_backward(*payload.tensors)
        return _finish(ctx, input, compute, quantizer, name, codes)

    @staticmethod
    @first_order_only(lambda ctx: ctx.name)
    def backward(ctx, grad_output):
        payload = ctx.format.payload(*ctx.saved_tensors)
        grad = grad_output.reshape(ctx.format.size)
        grad = ops.layout.with_strides(grad, ctx.format.stride)
        grad_input = payload.gradient(grad).view(ctx.size)
        return grad_input, None, None, None, None, None


class _CodedByNorm(Function):
    @staticmethod
    def forward(ctx, input, compute, payload, quantizer, name):
        ctx.format = payload.format
        ctx.save_for_backward(*payload.tensors)
        kept = payload.operands[:2]
        return _finish(ctx, input, compute, quantizer, name, kept)

    @staticmethod
    @first_order_only(lambda ctx: ctx.name)
    def backward(ctx, grad_output):
        payload = ctx.format.payload(*ctx.saved_tensors)
        grad = ops.layout.with_strides(grad_output, ctx.format.stride)
        return payload.gradient(grad), None, None, None, None


def _finish(ctx, input, compute, quantizer, name, kept):
    """Compute the output, after all codes: it may overwrite the input."""
    ctx.name, ctx.source = name, weakref.ref(input)
    output = compute(input)
    inplace = output is input
    if inplace:
        ctx.mark_dirty(input)
    if quantizer.meter is not None:
        # In place, torch keeps a copy of the input.
        read = meta_tensor(input.shape, input.dtype) if inplace else input
        quantizer.record(kept, Call(read, output, inplace=inplace))
    return output


def smooth(input, compute, function, quantizer, name):
    """An activation whose backward pass multiplies by a coded derivative.

    The output is exact. The gradient of the input is linear in the derivative
    and so unbiased where codes of that are kept. Where one code of the input
    serves the derivative and the layers that read the output, both are
    corrected to second order in the noise of rounding, and the rest of bias
    is below a tenth of the error.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16.
        compute (Callable): Maps the input to the output, or overwrites it.
        function (Smooth): The function that it computes.
        quantizer (LayerQuantizer): Settings of the layer.
        name (str): Name of the layer, for errors.

    Returns:
        Tensor[*]: The output.
    """
    if not has_joint_code(function, quantizer):
        return _CodedDerivative.apply(
            input, compute, function, quantizer, name
        )
    made = []
    output = _CodedInput.apply(input, compute, function, quantizer, name, made)
    quantizer.cache.put(output, made[0])
    return output


def smooth_of_norm(input, codes, compute, function, quantizer, name):
    """An activation behind a normalisation, whose codes serve it, too.

    Args:
        input (Tensor[N, C, *]): Output of the normalisation.
        codes (NormCodes): Codes that the normalisation keeps.
        compute (Callable): See :func:`smooth`.
        function (Smooth): See there; one of which one code serves value and
            derivative.
        quantizer (LayerQuantizer): See there.
        name (str): See there.

    Returns:
        Tensor[N, C, *]: The output.
    """
    format = codes.format._replace(kind='smooth', smooth=function)
    payload = format.make(*codes.operands)
    output = _CodedByNorm.apply(input, compute, payload, quantizer, name)
    quantizer.cache.put(output, payload)
    return output


def has_joint_code(function, quantizer):
    """Whether a layer keeps one code of its input for two uses.

    Args:
        function (Smooth): Function of the layer.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        bool: False where it keeps codes of its derivative.
    """
    return (
        function.one_code
        and quantizer.joint_act
        and quantizer.bits is not None
        and quantizer.bits >= _MIN_JOINT_BITS
        and quantizer.rounding != 'stochastic'
    )
