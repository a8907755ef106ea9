"""Rectifiers that keep one bit an element, or codes of their output."""

from torch.autograd import Function

from .. import ops
from ..codes.calls import Call
from ..codes.payload import PayloadFormat
from .double_backward import linear_map
from .in_place import finish, may_overwrite
from .placeholders import meta_tensor


class _Rectifier(Function):
    @staticmethod
    def forward(ctx, input, inplace, max, slope, quantizer):
        if may_overwrite(input, inplace):
            seen, mask = input, ops.relu_mask_(input, max, slope)
        else:
            seen, mask = ops.relu_mask(input, max, slope)
        output = finish(ctx, input, seen, inplace)
        ctx.save_for_backward(mask)
        ctx.stride, ctx.slope = seen.stride(), slope
        if quantizer.meter is not None:
            read = input
            if max is not None and inplace:
                # torch keeps a copy of the input.
                read = meta_tensor(input.shape, input.dtype)
            quantizer.record((mask,), Call(read, output, inplace=inplace))
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (mask,) = ctx.saved_tensors
        stride, slope = ctx.stride, ctx.slope

        def apply_mask(grad):
            grad = ops.layout.with_strides(grad, stride)
            return ops.relu_mask_backward(grad, mask, slope)

        grad_input = linear_map(apply_mask, apply_mask, grad_output)
        return grad_input, None, None, None, None


def relu(input, inplace, quantizer, max=None, slope=None):
    """Rectifier whose backward pass needs a mask of one bit an element.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16.
        inplace (bool): Whether to overwrite the input.
        quantizer (LayerQuantizer): Settings of the layer.
        max (float, optional): Cap of the output, 6 for ReLU6. Defaults to
            none.
        slope (float, optional): Slope below 0, for LeakyReLU. By default the
            output is 0 there.

    Returns:
        Tensor[*]: The output.
    """
    return _Rectifier.apply(input, inplace, max, slope, quantizer)


class _CodedReLU(Function):
    @staticmethod
    def forward(ctx, input, inplace, quantizer, made):
        rows = ops.layout.dense_rows(input)
        bits, group_size = quantizer.bits, quantizer.group_size
        draw = quantizer.generator.next(rows.device)
        random = quantizer.random(draw)
        if inplace and rows is input:
            seen = input
            codes, ranges = ops.relu_codes_(input, bits, group_size, **random)
        else:
            seen, codes, ranges = ops.relu_codes(
                rows, bits, group_size, **random
            )
        output = finish(ctx, input, seen, inplace)
        format = PayloadFormat.of(
            seen, bits, group_size, 'zeroed', quantizer.drawn_bits(draw)
        )
        made.append(format.make(codes, ranges))
        ctx.save_for_backward(codes)
        ctx.stride, ctx.bits = format.stride, bits
        ctx.rotated = random['rotated']
        if quantizer.meter is not None:
            call = Call(input, output, inplace=inplace)
            quantizer.record((codes, ranges), call)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (codes,) = ctx.saved_tensors
        stride, format = ctx.stride, (ctx.bits, ctx.rotated)

        def apply_mask(grad):
            grad = ops.layout.with_strides(grad, stride)
            return ops.relu_codes_backward(grad, codes, *format)

        grad_input = linear_map(apply_mask, apply_mask, grad_output)
        return grad_input, None, None, None


def relu_codes(input, inplace, quantizer):
    """ReLU that keeps zeroed codes of its output, also for its readers.

    Output and gradient are exact: code 0 marks the elements where no gradient
    passes. A layer that reads the output, and whose weight's gradient is
    linear in it, shares the codes.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16.
        inplace (bool): Whether to overwrite the input.
        quantizer (LayerQuantizer): Settings of the layer; 2 bits or more.

    Returns:
        Tensor[N, *]: The output.
    """
    made = []
    output = _CodedReLU.apply(input, inplace, quantizer, made)
    quantizer.cache.put(output, made[0])
    return output
