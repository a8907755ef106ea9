"""Split and zeroed codes, which hold the mask of a rectifier exactly."""

import torch

from ..extension import require_kernels
from ._fake import fake
from .quantize import DEFAULT_GROUP_SIZE, check_dtype, check_group_size
from .random_bits import drawn_arguments

__all__ = ['dequantize_split', 'dequantize_zeroed']


def check_rectified_bits(bits, name='bits'):
    """Check the width of split or zeroed codes.

    Args:
        bits (int): Bits a code.
        name (str, optional): Name of ``bits`` in errors. Defaults to
            ``'bits'``.

    Raises:
        ValueError: If ``bits`` is not an integer from 2 to 8.
    """
    if bits not in range(2, 9):
        raise ValueError(
            f'{name} must be an integer from 2 to 8 where there is a '
            f'rectifier, got {bits!r}'
        )


def check_rectified_format(bits, group_size, name='bits'):
    """Check the format of split or zeroed codes.

    Args:
        bits (int): Bits a code.
        group_size (int): Elements a range.
        name (str, optional): Name of ``bits`` in errors. Defaults to
            ``'bits'``.

    Raises:
        ValueError: If ``bits`` is not an integer from 2 to 8, or
            ``group_size`` not 64, 128, 256 or 512.
    """
    check_rectified_bits(bits, name)
    check_group_size(group_size)


def _check(codes, dtype, bits, group_size):
    check_rectified_format(bits, group_size)
    check_dtype(dtype)
    require_kernels(codes.device)


def dequantize_split(
    codes,
    ranges,
    weight,
    bias,
    size,
    stride,
    dtype,
    bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    drawn=None,
):
    """Decode split codes of a normalised input to the output of its ReLU.

    Rows of ``codes`` and ``ranges`` belong to samples, as in
    :func:`mmactnn.ops.dequantize`.

    Args:
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, from
            :func:`mmactnn.ops.norm_act` with a ReLU and without a residual.
        ranges (Tensor[N, ceil(M / group_size), R]): bfloat16, R being 4, or
            3 if the codes are rotated.
        weight (Tensor[C], optional): float32, scale; 1 if None.
        bias (Tensor[C], optional): float32, shift; 0 if None.
        size (Sequence[int]): Shape of the result, N and C first, of 2 to 5
            dimensions.
        stride (Sequence[int]): Strides of the result, those of a contiguous
            or channels_last tensor.
        dtype (torch.dtype): float32, float16 or bfloat16.
        bits (int): Bits a code, from 2 to 8.
        group_size (int, optional): Elements a range. Defaults to 256.
        drawn (DrawnBits, optional): Random bits that the tensor was rounded
            with. Defaults to none: codes alone are decoded.

    Returns:
        Tensor[N, C, *]: ``(low + code * step) * weight + bias`` where the
        output was positive, exactly 0 elsewhere; of ``dtype`` and ``stride``.
        With random bits see :class:`mmactnn.ops.DrawnBits`.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, the layout is another, or
            codes, ranges, parameters and size do not belong together.
    """
    _check(codes, dtype, bits, group_size)
    return torch.ops.mmactnn.dequantize_split.default(
        codes,
        ranges,
        weight,
        bias,
        size,
        stride,
        dtype,
        bits,
        group_size,
        *drawn_arguments(drawn),
    )


def dequantize_zeroed(
    codes,
    ranges,
    size,
    stride,
    dtype,
    bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    drawn=None,
):
    """Decode zeroed codes to the output of a ReLU.

    Args:
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, from
            :func:`mmactnn.ops.relu_codes`, or the ``act_codes`` of
            :func:`mmactnn.ops.norm_act`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        size (Sequence[int]): Shape of the result, N first.
        stride (Sequence[int]): Strides of the result, those of the output.
        dtype (torch.dtype): float32, float16 or bfloat16.
        bits (int): Bits a code, from 2 to 8.
        group_size (int, optional): Elements a range. Defaults to 256.
        drawn (DrawnBits, optional): Random bits that the tensor was rounded
            with. Defaults to none: codes alone are decoded.

    Returns:
        Tensor[N, *]: 0 where the code is 0, else ``low + (code - 1) * step``;
        of ``dtype`` and ``stride``. With random bits see
        :class:`mmactnn.ops.DrawnBits`.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or codes, ranges and size
            do not belong together.
    """
    _check(codes, dtype, bits, group_size)
    return torch.ops.mmactnn.dequantize_zeroed.default(
        codes,
        ranges,
        size,
        stride,
        dtype,
        bits,
        group_size,
        *drawn_arguments(drawn),
    )


@fake('dequantize_split')
def _fake_dequantize_split(
    codes, ranges, weight, bias, size, stride, dtype, *format
):
    return codes.new_empty_strided(size, stride, dtype=dtype)


@fake('dequantize_zeroed')
def _fake_dequantize_zeroed(codes, ranges, size, stride, dtype, *format):
    return codes.new_empty_strided(size, stride, dtype=dtype)
