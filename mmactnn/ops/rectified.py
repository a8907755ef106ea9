"""Rectified values from the codes that tell zeros from the others."""

import torch

from ..extension import require_kernels
from .quantize import DEFAULT_GROUP_SIZE, check_dtype, check_group_size


def check_rectified_bits(name, bits):
    """Check the width of split or zeroed codes.

    Args:
        name (str): What it is called.
        bits (int): The width.

    Raises:
        ValueError: If it is not an integer from 2 to 8.
    """
    if bits not in range(2, 9):
        raise ValueError(
            f'{name} of rectified values must be an integer from 2 to 8, got '
            f'{bits!r}'
        )


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
):
    """What a normalisation with ReLU has put out, from its split codes.

    Rows of ``codes`` and ``ranges`` belong to samples: for a range of
    samples pass slices of both and the size of the part.

    Args:
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, see
            :func:`mmactnn.ops.norm_act`.
        ranges (Tensor[N, ceil(M / group_size), 4]): bfloat16.
        weight (Tensor[C], optional): float32.
        bias (Tensor[C], optional): float32.
        size (Sequence[int]): Shape of the result, N and C first.
        stride (Sequence[int]): Strides of the result.
        dtype (torch.dtype): float32, float16 or bfloat16.
        bits (int): Bits a code, 2 to 8.
        group_size (int, optional): Elements a range. Defaults to 256.

    Returns:
        Tensor[N, C, *]: ``weight * x^ + bias`` where the output was not zero,
        else 0; finite where it was.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or codes, ranges and size
            do not belong together.
    """
    _check(codes, bits, group_size, dtype)
    return torch.ops.mmactnn.dequantize_split.default(
        codes, ranges, weight, bias, size, stride, dtype, bits, group_size
    )


def dequantize_zeroed(
    codes, ranges, size, stride, dtype, bits, group_size=DEFAULT_GROUP_SIZE
):
    """What ReLU has put out, from zeroed codes.

    Args:
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, see
            :func:`mmactnn.ops.norm_act`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        size (Sequence[int]): As :func:`dequantize_split`, and so are all
            below.
        stride (Sequence[int]): Strides of the result.
        dtype (torch.dtype): float32, float16 or bfloat16.
        bits (int): Bits a code, 2 to 8.
        group_size (int, optional): Elements a range. Defaults to 256.

    Returns:
        Tensor[N, C, *]: The values, exactly 0 where they were.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`dequantize_split`.
    """
    _check(codes, bits, group_size, dtype)
    return torch.ops.mmactnn.dequantize_zeroed.default(
        codes, ranges, size, stride, dtype, bits, group_size
    )


def _check(codes, bits, group_size, dtype):
    check_rectified_bits('bits', bits)
    check_group_size(group_size)
    check_dtype(dtype)
    require_kernels(codes.device)
