"""ReLU that keeps one bit an element."""

from torch.autograd import Function

from .. import ops
from .double_backward import first_order_only


class _ReLU(Function):
    @staticmethod
    def forward(ctx, input, inplace, quantizer):
        if inplace and ops.layout.is_dense(input):
            mask = ops.relu_mask_(input)
            seen = output = input
        else:
            seen, mask = ops.relu_mask(input)
            # Gaps in memory: the kernels want none.
            output = input.copy_(seen) if inplace else seen
        if inplace:
            ctx.mark_dirty(input)
        ctx.save_for_backward(mask)
        # The mask's order is that of the dense tensor the kernel saw.
        ctx.stride = seen.stride()
        quantizer.note(kept=(mask,), exact=(output,))
        return output

    @staticmethod
    @first_order_only('QReLU')
    def backward(ctx, grad_output):
        (mask,) = ctx.saved_tensors
        grad = ops.layout.with_strides(grad_output, ctx.stride)
        return ops.relu_mask_backward(grad, mask), None, None


def relu(input, inplace, quantizer):
    """ReLU whose backward needs a mask of one bit an element.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16.
        inplace (bool): Whether to overwrite the input.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*]: The output.
    """
    return _ReLU.apply(input, inplace, quantizer)
