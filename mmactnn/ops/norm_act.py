"""Fused normalisation, residual addition and ReLU, with codes."""

import torch

from ._fake import empty_payload, fake, row_numel
from .layout import dense_channels, with_strides
from .quantize import (
    DEFAULT_GROUP_SIZE,
    check_format,
    check_input,
)
from .random_bits import as_int64
from .rectified import check_rectified_format
from .rotation import rotates

__all__ = ['norm_act']


def _check(input, residual, vectors, relu, bits, act_bits, group_size):
    check_format(bits, group_size)
    if residual is not None:
        if not relu:
            raise ValueError(
                f'relu must be True where there is a residual, got {relu!r}'
            )
        check_rectified_format(act_bits, group_size, 'act_bits')
    elif relu:
        check_rectified_format(bits, group_size)
    check_input(input)
    if not 2 <= input.dim() <= 5:
        raise ValueError(
            'input must have 2 to 5 dimensions, got shape '
            f'{tuple(input.shape)}'
        )
    if residual is not None and residual.shape != input.shape:
        raise ValueError(
            f'residual must be of the shape of input, {tuple(input.shape)}, '
            f'got {tuple(residual.shape)}'
        )
    if residual is not None and residual.dtype != input.dtype:
        raise TypeError(
            f'residual must be of the dtype of input, {input.dtype}, got '
            f'{residual.dtype}'
        )
    for name, vector in vectors.items():
        if vector is None:
            continue
        if tuple(vector.shape) != (input.shape[1],):
            raise ValueError(
                f'{name} must be of shape ({input.shape[1]},), a number a '
                f'channel, got {tuple(vector.shape)}'
            )
        if vector.dtype != torch.float32:
            raise TypeError(f'{name} must be float32, got {vector.dtype}')


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
    offset_tensor=None,
    rotated=False,
):
    """Normalise, add a residual and rectify, with codes for the backward pass.

    The output is ``(input - mean) * invstd * weight + bias``, plus the
    residual, and with a ReLU 0 where this is not positive; each operation
    is rounded to float32, the sum to the dtype. The payload depends on the
    arguments:

    - without a ReLU, plain codes of the normalised input
      ``(input - mean) * invstd``, as of :func:`mmactnn.ops.quantize`;
    - with a ReLU, split codes of the normalised input: the highest bit is set
      for elements that pass the ReLU, the other bits are a code in the range
      of the elements with the same highest bit, so that a group has two
      ranges;
    - with a residual and a ReLU, plain codes of the normalised input, and
      zeroed codes of the output: 0 for 0, and c + 1 for code c in the range
      of the positive values.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16, of 2 to 5
            dimensions. Contiguous and channels_last tensors are read in
            place, others are copied first.
        residual (Tensor[N, C, *], optional): Of the shape and dtype of
            ``input``; of other strides it is copied.
        mean (Tensor[C]): float32.
        invstd (Tensor[C]): float32, inverse standard deviation.
        weight (Tensor[C], optional): float32.
        bias (Tensor[C], optional): float32.
        relu (bool): Whether a ReLU follows; required with a residual.
        bits (int): Bits a code of the normalised input, from 1 to 8, for
            split codes from 2.
        act_bits (int): Bits a code of the output, from 2 to 8; not used
            without a residual.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits; its highest bit
            is reserved for zeroed codes. Defaults to 0.
        offset_tensor (Tensor[1], optional): As in
            :func:`mmactnn.ops.quantize`.
        rotated (bool, optional): As in :func:`mmactnn.ops.quantize`. Ranges
            of rotated split codes are 3 numbers: the mean of elements that
            do not pass the ReLU, that of those that do, and the scale.
            Zeroed codes of 2 bits have the highest one set for passing
            elements then; others are not rotated.
            Defaults to False.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ``output`` (Tensor[N,
        C, *], dtype and layout of ``input``); ``codes`` of the normalised
        input (Tensor[N, ceil(M / 8) * bits], uint8), for M elements a sample;
        ``ranges`` of the normalised input (Tensor[N, ceil(M / group_size),
        2], bfloat16) of low and step, for split codes 4 numbers, those of
        elements that do not pass the ReLU first; ``act_codes`` and
        ``act_ranges`` of the output, shaped as those of plain codes of
        ``act_bits``, without elements if there is no residual.

    Raises:
        ValueError: If a width, ``group_size`` or a shape is not valid, or
            there is a residual without a ReLU.
        TypeError: If a dtype is not supported.
        RuntimeError: If the device has no kernels, tensors are on several
            devices, or ``offset_tensor`` is not valid.
    """
    vectors = dict(mean=mean, invstd=invstd, weight=weight, bias=bias)
    _check(input, residual, vectors, relu, bits, act_bits, group_size)
    input = dense_channels(input)
    if residual is not None:
        residual = with_strides(residual, input.stride())
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
        offset_tensor,
        rotated,
    )


@fake('norm_act')
def fake_norm_act(
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
    seed,
    offset,
    offset_tensor=None,
    rotated=False,
):
    """Fake kernel, also for ops that include this one."""
    output = torch.empty_like(input)
    codes, ranges = empty_payload(input, bits, group_size)
    if relu and residual is None:
        has_scale = rotated and rotates(row_numel(input), bits - 1)
        ranges = ranges.new_empty((*ranges.shape[:2], 3 if has_scale else 4))
    if residual is None:
        return output, codes, ranges, codes.new_empty(0), ranges.new_empty(0)
    act = empty_payload(input, act_bits, group_size)
    return output, codes, ranges, *act
