"""Normalisation, addition and rectification as one, with its payload."""

import torch

from .layout import dense_channels, with_strides
from .quantize import (
    DEFAULT_GROUP_SIZE,
    as_int64,
    check_format,
    check_rows,
)
from .rectified import check_rectified_bits


def norm_act(
    input,
    residual,
    mean,
    invstd,
    weight,
    bias,
    relu,
    bits,
    act_bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    seed,
    offset=0,
):
    """Normalise each channel, maybe add and rectify; keep it in codes.

    With x^ = ``(input - mean) * invstd`` the output is
    ``weight * x^ + bias``, plus ``residual``, and max(., 0) of that with
    ``relu``. What is kept of it:

    * without ``relu``: ``codes`` are the plain codes of x^, those of
      :func:`mmactnn.ops.quantize` of it;
    * with ``relu``: the split codes of x^. The highest bit is set where the
      output is not zero (or NaN), exactly; the others are a code in the range
      of the group's elements of that kind. ``ranges`` hold low and step of
      the kind of the zeros, then those of the others;
    * with ``residual``: plain codes of x^, and in ``act_codes`` the zeroed
      codes of the output: 0 for exactly zero, c for code c - 1 in the range
      of the elements that are not zero.

    Rounding is stochastic and unbiased as in :func:`mmactnn.ops.quantize`,
    whose layout of codes, groups and ranges holds here, too. The codes of
    the output have random bits of their own.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16 of 2 to 5
            dimensions. Contiguous and channels_last ones are read in place,
            others are copied first.
        residual (Tensor[N, C, *], optional): Of the same shape and dtype.
            Takes ``relu``.
        mean (Tensor[C]): float32.
        invstd (Tensor[C]): float32, inverse standard deviations.
        weight (Tensor[C], optional): float32.
        bias (Tensor[C], optional): float32.
        relu (bool): Whether to rectify.
        bits (int): Bits of ``codes``: 1 to 8, or 2 to 8 for split ones.
        act_bits (int): Bits of ``act_codes``, 2 to 8; 0 without ``residual``.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 63 bits. Defaults
            to 0.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ``output``
        (Tensor[N, C, *], of the dtype and strides of the input), ``codes``
        (uint8), ``ranges`` (Tensor[N, G, 2] or, of split codes,
        Tensor[N, G, 4], bfloat16), ``act_codes`` and ``act_ranges``
        (Tensor[N, G, 2], bfloat16; both of no elements without
        ``residual``).

    Raises:
        ValueError: If bits or group size are not valid, the input has fewer
            than two dimensions, or there is a residual without ``relu``.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or the tensors do not
            belong together.
    """
    arguments = _check(input, residual, relu, bits, act_bits, group_size)
    input, residual = arguments
    return torch.ops.mmactnn.norm_act.default(
        input,
        residual,
        mean,
        invstd,
        weight,
        bias,
        relu,
        bits,
        act_bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
    )


def norm_act_(
    input,
    residual,
    mean,
    invstd,
    weight,
    bias,
    relu,
    bits,
    act_bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    seed,
    offset=0,
):
    """:func:`norm_act` that writes its output over the input.

    Args:
        input (Tensor[N, C, *]): Contiguous or channels_last; overwritten.
        residual (Tensor[N, C, *], optional): As :func:`norm_act`; must not
            overlap the input.
        mean (Tensor[C]): As :func:`norm_act`, and so are all below.
        invstd (Tensor[C]): float32.
        weight (Tensor[C], optional): float32.
        bias (Tensor[C], optional): float32.
        relu (bool): Whether to rectify.
        bits (int): Bits of ``codes``.
        act_bits (int): Bits of ``act_codes``.
        group_size (int, optional): Elements a range. Defaults to 256.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits. Defaults to 0.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: ``codes``, ``ranges``,
        ``act_codes`` and ``act_ranges``.

    Raises:
        ValueError, TypeError, RuntimeError: As :func:`norm_act`, and if the
            input is in another layout.
    """
    dense, residual = _check(input, residual, relu, bits, act_bits, group_size)
    if dense is not input:
        raise ValueError(
            'an input that is overwritten must be contiguous or '
            f'channels_last, got strides {input.stride()} for the shape '
            f'{tuple(input.shape)}'
        )
    return torch.ops.mmactnn.norm_act_.default(
        input,
        residual,
        mean,
        invstd,
        weight,
        bias,
        relu,
        bits,
        act_bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
    )


def _check(input, residual, relu, bits, act_bits, group_size):
    """Check what is wrong in user's terms; input and residual, dense."""
    check_rows(input)
    if input.dim() < 2:
        raise ValueError(
            'input must have at least two dimensions, got shape '
            f'{tuple(input.shape)}'
        )
    check_format(bits, group_size)
    if relu and residual is None:
        check_rectified_bits('bits', bits)
    input = dense_channels(input)
    if residual is None:
        return input, None
    if not relu:
        raise ValueError('a residual is added where relu is True only')
    check_rectified_bits('act_bits', act_bits)
    if residual.shape != input.shape:
        raise ValueError(
            f'residual must be of shape {tuple(input.shape)}, got '
            f'{tuple(residual.shape)}'
        )
    return input, with_strides(residual, input.stride())
