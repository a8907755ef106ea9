"""Stochastic group-wise quantisation."""

import torch

from ..extension import require_kernels
from ._fake import empty_payload, fake
from .layout import dense_rows
from .random_bits import as_int64, drawn_arguments

__all__ = [
    'DEFAULT_GROUP_SIZE',
    'GROUP_SIZES',
    'VALID_BITS',
    'check_format',
    'dequantize',
    'quantize',
]

VALID_BITS = tuple(range(1, 9))
GROUP_SIZES = (64, 128, 256, 512)
DEFAULT_GROUP_SIZE = 256
VALID_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_group_size(group_size):
    """Check the number of elements a range.

    Raises:
        ValueError: If it is not 64, 128, 256 or 512.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f'group_size must be 64, 128, 256 or 512, got {group_size!r}'
        )


def check_format(bits, group_size):
    """Check the format of codes.

    Raises:
        ValueError: If ``bits`` is not an integer from 1 to 8, or
            ``group_size`` not 64, 128, 256 or 512.
    """
    if bits not in VALID_BITS:
        raise ValueError(f'bits must be an integer from 1 to 8, got {bits!r}')
    check_group_size(group_size)


def check_dtype(dtype):
    """Check the dtype that codes are to be decoded to.

    Raises:
        TypeError: If it is not float32, float16 or bfloat16.
    """
    if dtype not in VALID_DTYPES:
        raise TypeError(
            f'dtype must be float32, float16 or bfloat16, got {dtype}'
        )


def check_rows(tensor):
    """Check that there are kernels for the samples of a tensor.

    Raises:
        ValueError: If it has no dimension.
        TypeError: If the dtype is not float32, float16 or bfloat16.
        RuntimeError: If the device has no kernels.
    """
    check_input(tensor)
    if tensor.dim() == 0:
        raise ValueError(
            'input must have at least one dimension, got a scalar tensor'
        )


def check_input(tensor):
    """Check that there are kernels for a tensor.

    Raises:
        TypeError: If the dtype is not float32, float16 or bfloat16.
        RuntimeError: If the device has no kernels.
    """
    if tensor.dtype not in VALID_DTYPES:
        raise TypeError(
            'compressed layers take float32, float16 or bfloat16 '
            f'tensors, got {tensor.dtype}; convert the input, or '
            'use level L0'
        )
    require_kernels(tensor.device)


def quantize(
    input,
    bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    seed,
    offset=0,
    offset_tensor=None,
    rotated=False,
):
    """Round a tensor to codes of a few bits, stochastically.

    The elements of each sample, in memory order, are cut into groups. A group
    is kept as codes and a pair of bfloat16 numbers ``(low, step)``, ``low``
    rounded down and ``step`` up so that every value lies in the range. A
    value x becomes ``floor((x - low) / step + u)`` with u uniform on [0, 1):
    ``low + code * step`` has the expectation x and, for a fraction f of a
    step above the code below, the variance ``step ** 2 * f * (1 - f)``
    (ActNN, arXiv:2104.14129, Sec. 3.1). The range is per group as there
    (Sec. 4.1); its outward rounding, without which values at the ends of the
    range are biased, is ours.

    NaN and inf keep their places: the finite values of a group with any
    decode to the middle of their range; at 1 bit inf decodes to NaN.

    Args:
        input (Tensor[N, *]): float32, float16 or bfloat16. Contiguous,
            channels_last and other dense layouts with dimension 0 outermost
            are read in place, others are copied first.
        bits (int): Bits a code, from 1 to 8.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 64 bits. Two calls
            of equal seed and offset round alike. Defaults to 0.
        offset_tensor (Tensor[1], optional): int64, on the device of
            ``input``. The kernel adds it to ``offset``, so that a CUDA graph
            that increments it rounds anew in every replay. Defaults to 0.
        rotated (bool, optional): Whether to rotate groups where there are
            such codes, see :class:`mmactnn.ops.DrawnBits`: ``ranges`` then
            hold mean and scale. Needs ``group_size=256``. Defaults to False.

    Returns:
        tuple[Tensor, Tensor]: ``codes`` (Tensor[N, ceil(M / 8) * bits],
        uint8) for M elements a sample: a block of 8 elements takes ``bits``
        bytes, the first element in the lowest bits of the little-endian word
        that they make; ``ranges`` (Tensor[N, ceil(M / group_size), 2],
        bfloat16) of low and step.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid, or ``input``
            has no dimension.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or ``offset_tensor`` is not
            valid.
    """
    check_format(bits, group_size)
    check_rows(input)
    return torch.ops.mmactnn.quantize.default(
        dense_rows(input),
        bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
        offset_tensor,
        rotated,
    )


def dequantize(
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
    """Turn codes back into values.

    Rows of ``codes`` and ``ranges`` belong to samples: for a range of
    samples pass slices of both and the size of the part.

    Args:
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, from :func:`quantize`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        size (Sequence[int]): Shape of the result, N first.
        stride (Sequence[int]): Strides of the result, those of the tensor
            that was quantised.
        dtype (torch.dtype): float32, float16 or bfloat16.
        bits (int): Bits a code, from 1 to 8.
        group_size (int, optional): Elements a range. Defaults to 256.
        drawn (DrawnBits, optional): Random bits that the tensor was rounded
            with. Defaults to none: codes alone are decoded.

    Returns:
        Tensor[N, *]: ``low + code * step``, of ``dtype`` and ``stride``; with
        random bits see :class:`mmactnn.ops.DrawnBits`.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or codes, ranges and size
            do not belong together.
    """
    check_format(bits, group_size)
    check_dtype(dtype)
    require_kernels(codes.device)
    return torch.ops.mmactnn.dequantize.default(
        codes,
        ranges,
        size,
        stride,
        dtype,
        bits,
        group_size,
        *drawn_arguments(drawn),
    )


@fake('quantize')
def _fake_quantize(input, bits, group_size, *rounding):
    return empty_payload(input, bits, group_size)


@fake('dequantize')
def _fake_dequantize(codes, ranges, size, stride, dtype, *format):
    return codes.new_empty_strided(size, stride, dtype=dtype)
