"""ReLU that remembers one bit an element."""

import torch

from .layout import dense
from .quantize import check_input


def relu_mask(input):
    """ReLU and the mask of the elements that passed.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16, any dense layout;
            others are copied first.

    Returns:
        tuple[Tensor, Tensor]: The output (Tensor[*], the input's layout) and
        the mask (Tensor[ceil(numel / 8)], uint8): bit i of byte j is 1 where
        element 8 j + i in memory order is greater than 0 or NaN, as
        ``torch.relu`` lets NaN pass.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels.
    """
    check_input(input)
    return torch.ops.mmactnn.relu_mask.default(dense(input))


def relu_mask_(input):
    """The same in place.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16, dense; overwritten.

    Returns:
        Tensor[ceil(numel / 8)]: uint8, the mask.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or the tensor is not
            dense.
    """
    check_input(input)
    return torch.ops.mmactnn.relu_mask_.default(input)


def relu_mask_backward(grad_output, mask):
    """The gradient of ReLU from its mask.

    Args:
        grad_output (Tensor[*]): In the memory order of the output.
        mask (Tensor[ceil(numel / 8)]): uint8, from :func:`relu_mask`.

    Returns:
        Tensor[*]: ``grad_output`` where the bit is 1, else 0.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or the mask does not fit.
    """
    check_input(grad_output)
    return torch.ops.mmactnn.relu_mask_backward.default(grad_output, mask)
