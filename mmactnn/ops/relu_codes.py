"""ReLU with zeroed codes of its output, which its backward pass uses, too."""

import torch

from ._fake import empty_payload, fake
from .layout import dense_rows
from .quantize import (
    DEFAULT_GROUP_SIZE,
    check_rows,
)
from .random_bits import as_int64
from .rectified import check_rectified_bits, check_rectified_format

__all__ = ['relu_codes', 'relu_codes_', 'relu_codes_backward']


def relu_codes(
    input,
    bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    seed,
    offset=0,
    offset_tensor=None,
    rotated=False,
):
    """ReLU and zeroed codes of its output.

    One payload serves the ReLU and the next layer. Code 0 stands for exactly
    0, where no gradient passes; code c + 1 is code c in the range of the
    positive values of the group, rounded as in
    :func:`mmactnn.ops.quantize`. :func:`mmactnn.ops.dequantize_zeroed`
    decodes.

    NaN passes, as in torch: it and inf keep their places, and the finite
    positive values of a group with any decode to the middle of their range.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16. Contiguous,
            channels_last and other dense layouts with dimension 0 outermost
            are read in place, others are copied first.
        bits (int): Bits a code, from 2 to 8.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 64 bits. Defaults
            to 0.
        offset_tensor (Tensor[1], optional): As in
            :func:`mmactnn.ops.quantize`.
        rotated (bool, optional): As in :func:`mmactnn.ops.quantize`, at 2
            bits; codes of passing elements then have the highest bit set, and
            no code stands for 0 alone. With more bits dither has less
            variance. Defaults to False.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The output (Tensor[N, *], dtype and
        layout of the input), ``codes`` (Tensor[N, ceil(M / 8) * bits],
        uint8) for M elements a sample and ``ranges`` (Tensor[N, ceil(M /
        group_size), 2], bfloat16) of low and step.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid, or ``input``
            has no dimension.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or ``offset_tensor`` is not
            valid.
    """
    check_rectified_format(bits, group_size)
    check_rows(input)
    return torch.ops.mmactnn.relu_codes.default(
        dense_rows(input),
        bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
        offset_tensor,
        rotated,
    )


def relu_codes_(
    input,
    bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    seed,
    offset=0,
    offset_tensor=None,
    rotated=False,
):
    """:func:`relu_codes` in place.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16, dense with
            dimension 0 outermost in memory; overwritten.
        bits (int): See :func:`relu_codes`.
        group_size (int, optional): See :func:`relu_codes`.
        seed (int): See :func:`relu_codes`.
        offset (int, optional): See :func:`relu_codes`.
        offset_tensor (Tensor[1], optional): See :func:`relu_codes`.
        rotated (bool, optional): See :func:`relu_codes`.

    Returns:
        tuple[Tensor, Tensor]: ``codes`` and ``ranges`` of
        :func:`relu_codes`.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid, or ``input``
            has no dimension.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, the layout is another, or
            ``offset_tensor`` is not valid.
    """
    check_rectified_format(bits, group_size)
    check_rows(input)
    return torch.ops.mmactnn.relu_codes_.default(
        input,
        bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
        offset_tensor,
        rotated,
    )


def relu_codes_backward(grad_output, codes, bits, rotated=False):
    """Gradient of a ReLU from the codes of its output.

    Args:
        grad_output (Tensor[N, *]): Gradient, with the strides of the output.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, from
            :func:`relu_codes`; any zeroed codes of M elements a sample.
        bits (int): Bits a code, from 2 to 8.
        rotated (bool, optional): As in :func:`relu_codes`.

    Returns:
        Tensor[N, *]: ``grad_output`` where the output was not 0, else 0.

    Raises:
        ValueError: If ``bits`` is not valid, or ``grad_output`` has no
            dimension.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, the layout is another, or
            codes and gradient do not belong together.
    """
    check_rectified_bits(bits)
    check_rows(grad_output)
    return torch.ops.mmactnn.relu_codes_backward.default(
        grad_output, codes, bits, rotated
    )


@fake('relu_codes')
def _fake_relu_codes(input, bits, group_size, *rounding):
    return torch.empty_like(input), *empty_payload(input, bits, group_size)


@fake('relu_codes_')
def _fake_relu_codes_(input, bits, group_size, *rounding):
    return empty_payload(input, bits, group_size)


@fake('relu_codes_backward')
def _fake_relu_codes_backward(grad_output, codes, bits, rotated=False):
    return torch.empty_like(grad_output)
