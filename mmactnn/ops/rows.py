"""Quantisation with a bit width for each sample, and their allocation."""

import torch

from ..extension import require_kernels
from ._fake import ceil_div, empty_ranges, fake, row_numel
from .layout import dense_rows
from .quantize import (
    DEFAULT_GROUP_SIZE,
    VALID_BITS,
    check_dtype,
    check_group_size,
    check_rows,
)
from .random_bits import as_int64, drawn_arguments

__all__ = [
    'allocate_sample_bits',
    'dequantize_rows',
    'quantize_rows',
    'sample_range_energy',
]


def check_total_bits(total_bits, rows):
    """Check the sum of one bit width for each row.

    Raises:
        ValueError: If it is not an integer from ``rows`` to ``8 * rows``.
    """
    limits = rows * VALID_BITS[0], rows * VALID_BITS[-1]
    if not isinstance(total_bits, int) or not (
        limits[0] <= total_bits <= limits[1]
    ):
        raise ValueError(
            f'total_bits must be an integer from {limits[0]} to {limits[1]} '
            f'for {rows} rows, got {total_bits!r}'
        )


def quantize_rows(
    input,
    row_bits,
    row_starts,
    total_bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    seed,
    offset=0,
    offset_tensor=None,
    rotated=False,
):
    """Round each sample of a tensor to codes of its own width.

    A sample of b bits gets the codes and ranges that :func:`quantize` gives
    it at b bits, seed and offset. Nothing waits for the device: a row whose
    bits are not 1 to 8, or that would end behind ``total_bits``, is skipped,
    and decodes to undefined values.

    Args:
        input (Tensor[N, *]): As in :func:`quantize`.
        row_bits (Tensor[N]): uint8, bits a code of each sample, 1 to 8.
        row_starts (Tensor[N]): int32, the sum of ``row_bits`` of all samples
            before; both from :func:`allocate_sample_bits`.
        total_bits (int): The sum of ``row_bits``.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 64 bits. Defaults
            to 0.
        offset_tensor (Tensor[1], optional): As in :func:`quantize`.
        rotated (bool, optional): As in :func:`quantize`, for the samples
            whose codes have few enough bits. Defaults to False.

    Returns:
        tuple[Tensor, Tensor]: ``codes`` (Tensor[total_bits * B], uint8), B
        being the blocks of 8 elements of a sample, rounded up to a multiple
        of 8: sample n takes ``row_bits[n] * B`` bytes from byte
        ``row_starts[n] * B`` on, zero where there are no elements; ``ranges``
        as from :func:`quantize`.

    Raises:
        ValueError: If ``total_bits`` or ``group_size`` is not valid, or
            ``input`` has no dimension.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or ``row_bits``,
            ``row_starts`` or ``offset_tensor`` does not fit the input.
    """
    check_group_size(group_size)
    check_rows(input)
    check_total_bits(total_bits, input.shape[0])
    return torch.ops.mmactnn.quantize_rows.default(
        dense_rows(input),
        row_bits,
        row_starts,
        total_bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
        offset_tensor,
        rotated,
    )


def dequantize_rows(
    codes,
    ranges,
    row_bits,
    row_starts,
    size,
    stride,
    dtype,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    drawn=None,
):
    """Turn codes of several widths back into values.

    For a range of samples pass all codes, slices of ``ranges``, ``row_bits``
    and ``row_starts``, and the size of the part.

    Args:
        codes (Tensor[total_bits * B]): uint8, from :func:`quantize_rows`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        row_bits (Tensor[N]): uint8, bits a code of each sample.
        row_starts (Tensor[N]): int32, the sum of the bits of all samples
            before.
        size (Sequence[int]): Shape of the result, N first.
        stride (Sequence[int]): Strides of the result, those of the tensor
            that was quantised.
        dtype (torch.dtype): float32, float16 or bfloat16.
        group_size (int, optional): Elements a range. Defaults to 256.
        drawn (DrawnBits, optional): Random bits that the tensor was rounded
            with. Defaults to none: codes alone are decoded.

    Returns:
        Tensor[N, *]: ``low + code * step``, of ``dtype`` and ``stride``; with
        random bits see :class:`mmactnn.ops.DrawnBits`.

    Raises:
        ValueError: If ``group_size`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or codes, ranges, widths
            and size do not belong together.
    """
    check_group_size(group_size)
    check_dtype(dtype)
    require_kernels(codes.device)
    return torch.ops.mmactnn.dequantize_rows.default(
        codes,
        ranges,
        row_bits,
        row_starts,
        size,
        stride,
        dtype,
        group_size,
        *drawn_arguments(drawn),
    )


def sample_range_energy(input, group_size=DEFAULT_GROUP_SIZE):
    """Range energy of each sample: sum of ``n * (max - min) ** 2``.

    Rounding a group of n elements to b bits has a variance of at most
    ``n / 4 * ((max - min) / (2 ** b - 1)) ** 2``. The energy is the factor of
    it that depends on the values.

    Args:
        input (Tensor[N, *]): As in :func:`quantize`.
        group_size (int, optional): Elements a group. Valid values are 64,
            128, 256 and 512. Defaults to 256.

    Returns:
        Tensor[N]: float32, the sum over the groups of a sample, n being the
        elements of a group. Only finite values enter ``max`` and ``min``;
        sums are clamped to the largest float32.

    Raises:
        ValueError: If ``group_size`` is not valid, or ``input`` has no
            dimension.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels.
    """
    check_group_size(group_size)
    check_rows(input)
    return torch.ops.mmactnn.sample_range_energy.default(
        dense_rows(input), group_size
    )


def allocate_sample_bits(sensitivity, total_bits):
    """Allocate bits to samples so that the variance of rounding is minimal.

    Minimises ``sum(sensitivity / (2 ** row_bits - 1) ** 2)`` over integers
    from 1 to 8 of a given sum (the bits of samples in ActNN,
    arXiv:2104.14129, Sec. 4.2): every sample has one bit, and each further
    one goes where it lowers the sum most. The terms are convex in the bits,
    so that this greedy choice is the minimum. Of two samples with equal gains
    the one with fewer bits comes first, then the one of the lower index; bits
    without gain are spread evenly. Nothing waits for the device.

    Args:
        sensitivity (Tensor[N]): float32, such as
            :func:`sample_range_energy` times the cost of an error in the
            sample. NaN and inf count as the largest float32, negative numbers
            as 0.
        total_bits (int): Bits to allocate, from N to 8 N.

    Returns:
        tuple[Tensor, Tensor]: ``row_bits`` (Tensor[N], uint8), of the sum
        ``total_bits``; ``row_starts`` (Tensor[N], int32), the sum of the bits
        of all samples before.

    Raises:
        ValueError: If ``total_bits`` is not valid, or ``sensitivity`` has not
            one dimension.
        TypeError: If ``sensitivity`` is not float32.
        RuntimeError: If the device has no kernels.
    """
    if sensitivity.dtype != torch.float32:
        raise TypeError(
            f'sensitivity must be float32, got {sensitivity.dtype}'
        )
    if sensitivity.dim() != 1:
        raise ValueError(
            'sensitivity must have one dimension, got '
            f'{tuple(sensitivity.shape)}'
        )
    check_total_bits(total_bits, sensitivity.shape[0])
    require_kernels(sensitivity.device)
    return torch.ops.mmactnn.allocate_sample_bits.default(
        sensitivity.contiguous(), total_bits
    )


@fake('quantize_rows')
def _fake_quantize_rows(
    input,
    row_bits,
    row_starts,
    total_bits,
    group_size,
    *rounding,
):
    # Rows are padded to 8 blocks of 8 elements.
    row_blocks = ceil_div(row_numel(input), 64) * 8
    codes = input.new_empty((total_bits * row_blocks,), dtype=torch.uint8)
    return codes, empty_ranges(input, group_size)


@fake('dequantize_rows')
def _fake_dequantize_rows(
    codes, ranges, row_bits, row_starts, size, stride, dtype, *format
):
    return codes.new_empty_strided(size, stride, dtype=dtype)


@fake('sample_range_energy')
def _fake_sample_range_energy(input, group_size):
    return input.new_empty((input.shape[0],), dtype=torch.float32)


@fake('allocate_sample_bits')
def _fake_allocate_sample_bits(sensitivity, total_bits):
    row_bits = torch.empty_like(sensitivity, dtype=torch.uint8)
    return row_bits, torch.empty_like(sensitivity, dtype=torch.int32)
