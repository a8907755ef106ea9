"""Rectifiers that keep one bit an element, or codes of their output."""

from torch.autograd import Function

from .. import ops
from ..payload import PayloadFormat, share
from .double_backward import first_order_only
from .in_place import finish, may_overwrite
from .stand_in import counted


def rectify(input, overwrite, max=None, slope=None):
    """The forward pass of a rectifier.

    Args:
        input (Tensor[*]): See :func:`relu`.
        overwrite (bool): Whether the output may be written over the input; it
            is where the layout allows.
        max (float, optional): See :func:`relu`.
        slope (float, optional): See :func:`relu`.

    Returns:
        tuple[Tensor[*], Tensor]: The output, in whose memory order the mask
        is, and the mask.
    """
    if may_overwrite(input, overwrite):
        return input, ops.relu_mask_(input, max, slope)
    return ops.relu_mask(input, max, slope)


def rectified_gradient(grad_output, mask, stride, slope=None):
    """The backward pass of a rectifier.

    Args:
        grad_output (Tensor[*]): Gradient of the output.
        mask (Tensor): From :func:`rectify`.
        stride (tuple[int]): Strides of what :func:`rectify` returned.
        slope (float, optional): See :func:`relu`.

    Returns:
        Tensor[*]: Gradient of the input.
    """
    grad = ops.layout.with_strides(grad_output, stride)
    return ops.relu_mask_backward(grad, mask, slope)


class _Rectifier(Function):
    @staticmethod
    def forward(ctx, input, inplace, max, slope, quantizer):
        seen, mask = rectify(input, inplace, max, slope)
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
        grad_input = rectified_gradient(
            grad_output, mask, ctx.stride, ctx.slope
        )
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
