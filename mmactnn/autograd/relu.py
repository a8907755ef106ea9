"""Rectifiers that keep one bit an element, or codes of their output."""

from torch.autograd import Function

from .. import ops
from ..codes.payload import PayloadFormat, share
from .double_backward import first_order_only
from .in_place import finish, may_overwrite
from .stand_in import counted


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
        if max is not None and inplace:
            exact = counted(input.shape, input.dtype)  # torch keeps a copy
        elif max is None and slope is None:
            exact = output
        else:
            exact = input
        quantizer.note(kept=(mask,), exact=(exact,))
        return output

    @staticmethod
    @first_order_only('A rectifier (QReLU, QReLU6, QLeakyReLU)')
    def backward(ctx, grad_output):
        (mask,) = ctx.saved_tensors
        grad = ops.layout.with_strides(grad_output, ctx.stride)
        grad_input = ops.relu_mask_backward(grad, mask, ctx.slope)
        return grad_input, None, None, None, None


def relu(input, inplace, quantizer, max=None, slope=None):
    """A rectifier whose backward needs a mask of one bit an element.

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
        random = quantizer.generator.next(rows.device)._asdict()
        if inplace and rows is input:
            seen = input
            codes, ranges = ops.relu_codes_(input, bits, group_size, **random)
        else:
            seen, codes, ranges = ops.relu_codes(
                rows, bits, group_size, **random
            )
        output = finish(ctx, input, seen, inplace)
        format = PayloadFormat.of(seen, bits, group_size, 'zeroed')
        made.append(format.payload(codes, ranges))
        ctx.save_for_backward(codes)
        ctx.stride, ctx.bits = format.stride, bits
        quantizer.note(kept=(codes, ranges), exact=(output,))
        return output

    @staticmethod
    @first_order_only('A rectifier (QReLU)')
    def backward(ctx, grad_output):
        (codes,) = ctx.saved_tensors
        grad = ops.layout.with_strides(grad_output, ctx.stride)
        grad_input = ops.relu_codes_backward(grad, codes, ctx.bits)
        return grad_input, None, None, None


def relu_codes(input, inplace, quantizer):
    """ReLU that keeps zeroed codes of its output, for itself and its readers.

    Output and gradient are exact: whether a gradient passes, the codes tell.
    A layer that reads the output, and whose weight's gradient is linear in
    it, needs no codes of its own.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16.
        inplace (bool): Whether to overwrite the input.
        quantizer (LayerQuantizer): Settings of the layer; 2 bits or more.

    Returns:
        Tensor[N, *]: The output.
    """
    made = []
    output = _CodedReLU.apply(input, inplace, quantizer, made)
    share(output, made[0])
    return output
