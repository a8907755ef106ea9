"""Max pooling that keeps 4 bits an output."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from ._fake import ceil_div, fake
from .layout import suggests_channels_last
from .quantize import check_input

__all__ = ['MAX_TAPS', 'as_pair', 'max_pool2d', 'max_pool2d_backward']

# Largest number of taps, as 4 bits hold a position.
MAX_TAPS = 16


class PoolFormat(NamedTuple):
    """Geometry of max pooling for its backward pass.

    Attributes:
        kernel_size (tuple[int, int]): Height and width of a window.
        stride (tuple[int, int]): Steps between windows.
        padding (tuple[int, int]): Padding, on both sides.
        dilation (tuple[int, int]): Steps between the taps of a window.
        input_size (tuple[int, int]): Height and width of the input.
        channels_last (bool): Whether both tensors are channels_last.
    """

    kernel_size: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    input_size: tuple
    channels_last: bool


def max_pool2d(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False
):
    """Max pooling with the position of each maximum in its window.

    As in torch the first of equal elements is the maximum, but the last NaN
    if there is any.

    Args:
        input (Tensor[N, C, H, W] | Tensor[C, H, W]): float32, float16 or
            bfloat16. Contiguous and channels_last tensors are read in place,
            others are copied first.
        kernel_size (int | tuple[int, int]): Size of a window: 16 taps at
            most.
        stride (int | tuple[int, int], optional): Steps between windows.
            Defaults to the window's size.
        padding (int | tuple[int, int], optional): Padding by -inf. Defaults
            to 0.
        dilation (int | tuple[int, int], optional): Steps between the taps of
            a window. Defaults to 1.
        ceil_mode (bool, optional): Whether windows may end outside of the
            padded input. Defaults to False.

    Returns:
        tuple[Tensor, Tensor, PoolFormat]: The output, as torch's in shape
        and memory format; the positions (Tensor[ceil(numel / 2)], uint8):
        the low and the high half of byte j hold ``row * width + column``
        inside of the window for the outputs 2 j and 2 j + 1 in memory order;
        the geometry for :func:`max_pool2d_backward`.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, a window has more than 16
            taps, or as ``torch.nn.functional.max_pool2d``.
    """
    check_input(input)
    format = PoolFormat(
        as_pair(kernel_size),
        # As in torch, an empty sequence means None.
        as_pair(kernel_size if stride in (None, (), []) else stride),
        as_pair(padding),
        as_pair(dilation),
        tuple(input.shape[-2:]),
        suggests_channels_last(input),
    )
    output_size = _output_size(input, format, ceil_mode)
    if output_size is None:
        # torch raises its own error.
        F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
        raise RuntimeError(f'max_pool2d has no kernel for {format}')
    memory_format = (
        torch.channels_last
        if format.channels_last
        else torch.contiguous_format
    )
    output, indices = torch.ops.mmactnn.max_pool2d.default(
        input.contiguous(memory_format=memory_format),
        *format[:4],
        output_size,
        format.channels_last,
    )
    return output, indices, format


def max_pool2d_backward(grad_output, indices, format):
    """Gradient of max pooling from the positions of the maxima.

    Each element of the input sums the gradients of the windows whose maximum
    it is, in a fixed order and in float32: without atomic operations, and
    with equal sums on every device.

    Args:
        grad_output (Tensor[N, C, H, W] | Tensor[C, H, W]): float32, float16
            or bfloat16, in the memory order of the output.
        indices (Tensor[ceil(numel / 2)]): uint8, from :func:`max_pool2d`.
        format (PoolFormat): From :func:`max_pool2d`.

    Returns:
        Tensor: The gradient of the input, in its shape and memory format.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or the arguments do not
            belong together.
    """
    check_input(grad_output)
    return torch.ops.mmactnn.max_pool2d_backward.default(
        grad_output, indices, *format
    )


def as_pair(value):
    """Two numbers from one or two, as torch reads sizes of windows.

    Args:
        value (int | Sequence[int]): One number, alone or in a sequence, is
            repeated; longer sequences are not changed.

    Returns:
        tuple[int]: The numbers.
    """
    pair = tuple(_pair(value))
    return pair * 2 if len(pair) == 1 else pair


def _output_size(input, format, ceil_mode):
    """Height and width of the output; None if torch refuses the arguments.

    As ``pooling_output_shape`` of torch's ATen/native/Pool.h.
    """
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        return None
    if any(len(pair) != 2 for pair in format[:4]):
        return None
    output_size = []
    for size, kernel, stride, padding, dilation in zip(
        format.input_size, *format[:4]
    ):
        if kernel <= 0 or stride <= 0 or dilation <= 0:
            return None
        if not 0 <= padding <= kernel // 2:
            return None
        steps = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (steps + (stride - 1 if ceil_mode else 0)) // stride + 1
        # The last window must begin in the input or in the padding before it.
        if ceil_mode and (count - 1) * stride >= size + padding:
            count -= 1
        if count <= 0:
            return None
        output_size.append(count)
    return output_size


def _empty_pooled(like, size, channels_last):
    output = like.new_empty((*like.shape[:-2], *size))
    if channels_last:
        output = output.contiguous(memory_format=torch.channels_last)
    return output


@fake('max_pool2d')
def _fake_max_pool2d(
    input, kernel_size, stride, padding, dilation, output_size, channels_last
):
    output = _empty_pooled(input, output_size, channels_last)
    indices = input.new_empty(
        (ceil_div(output.numel(), 2),), dtype=torch.uint8
    )
    return output, indices


@fake('max_pool2d_backward')
def _fake_max_pool2d_backward(
    grad_output,
    indices,
    kernel_size,
    stride,
    padding,
    dilation,
    input_size,
    channels_last,
):
    return _empty_pooled(grad_output, input_size, channels_last)
