"""Rectifiers that keep one bit an element: ReLU, ReLU6, LeakyReLU."""

import torch

from ._fake import ceil_div, fake
from .layout import dense
from .quantize import check_input

__all__ = ['relu_mask', 'relu_mask_', 'relu_mask_backward']


def relu_mask(input, max=None, slope=None):
    """Rectify, and make the mask of elements whose gradient passes.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16, any dense layout;
            others are copied first.
        max (float, optional): Cap of the output, 6 for ReLU6. Defaults to
            none.
        slope (float, optional): Factor of elements that are not positive, for
            LeakyReLU. Defaults to 0.

    Returns:
        tuple[Tensor, Tensor]: The output (Tensor[*], the input's layout) and
        the mask (Tensor[ceil(numel / 8)], uint8): bit i of byte j is 1 where
        element 8 j + i in memory order is greater than 0 and less than
        ``max``. As in torch it is 1 for NaN, too, but not with a slope.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or both ``max`` and
            ``slope`` are given.
    """
    check_input(input)
    return torch.ops.mmactnn.relu_mask.default(dense(input), max, slope)


def relu_mask_(input, max=None, slope=None):
    """:func:`relu_mask` in place.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16, dense; overwritten.
        max (float, optional): See :func:`relu_mask`.
        slope (float, optional): See :func:`relu_mask`.

    Returns:
        Tensor[ceil(numel / 8)]: uint8, the mask.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, the tensor is not dense,
            or both ``max`` and ``slope`` are given.
    """
    check_input(input)
    return torch.ops.mmactnn.relu_mask_.default(input, max, slope)


def relu_mask_backward(grad_output, mask, slope=None):
    """Gradient of a rectifier from its mask.

    Args:
        grad_output (Tensor[*]): In the memory order of the output.
        mask (Tensor[ceil(numel / 8)]): uint8, from :func:`relu_mask`.
        slope (float, optional): As in :func:`relu_mask`.

    Returns:
        Tensor[*]: ``grad_output`` where the bit is 1, else 0 or, with a
        slope, ``grad_output * slope``.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or the mask does not fit.
    """
    check_input(grad_output)
    return torch.ops.mmactnn.relu_mask_backward.default(
        grad_output, mask, slope
    )


@fake('relu_mask')
def _fake_relu_mask(input, max=None, slope=None):
    return torch.empty_like(input), _fake_relu_mask_(input)


@fake('relu_mask_')
def _fake_relu_mask_(input, max=None, slope=None):
    return input.new_empty((ceil_div(input.numel(), 8),), dtype=torch.uint8)


@fake('relu_mask_backward')
def _fake_relu_mask_backward(grad_output, mask, slope=None):
    return torch.empty_like(grad_output)
