"""Batch normalisation fused with addition and ReLU, and its backward pass.

Each function combines :func:`channel_stats`, :func:`norm_act` and the
functions of :mod:`mmactnn.ops.norm_grad` in one call: a training step calls
them for every layer, so that the host's time for a call matters. The kernels
check their arguments.
"""

from typing import NamedTuple

import torch

from ..extension import require_kernels
from ._fake import empty_sums, fake
from .layout import dense_channels, with_strides
from .norm_act import fake_norm_act
from .quantize import DEFAULT_GROUP_SIZE
from .random_bits import as_int64, drawn_arguments

__all__ = [
    'NormSettings',
    'batch_norm_act',
    'batch_norm_act_',
    'batch_norm_act_backward',
]


class NormSettings(NamedTuple):
    """Statistics and constants of a batch normalisation.

    Attributes:
        running_mean (Tensor[C], optional): float32, float16 or bfloat16,
            contiguous; updated with the mean of the batch, or used in its
            place.
        running_var (Tensor[C], optional): Likewise.
        num_batches_tracked (Tensor[], optional): int64, number of batches.
        use_batch_stats (bool): Whether to normalise with the statistics of
            the batch.
        momentum (float): Weight of the batch in the running statistics.
        eps (float): Added to the variance.
    """

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None
    use_batch_stats: bool
    momentum: float
    eps: float


def batch_norm_act(
    input,
    residual,
    weight,
    bias,
    settings,
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
    """Compute statistics of channels and run :func:`norm_act` with them.

    Args:
        input (Tensor[N, C, *]): See :func:`norm_act`.
        residual (Tensor[N, C, *], optional): See :func:`norm_act`.
        weight (Tensor[C], optional): float32.
        bias (Tensor[C], optional): float32.
        settings (NormSettings): Statistics and constants.
        relu (bool): See :func:`norm_act`.
        bits (int): See :func:`norm_act`.
        act_bits (int): See :func:`norm_act`.
        group_size (int, optional): See :func:`norm_act`.
        seed (int): See :func:`norm_act`.
        offset (int, optional): See :func:`norm_act`.
        offset_tensor (Tensor[1], optional): See :func:`norm_act`.
        rotated (bool, optional): See :func:`norm_act`.

    Returns:
        tuple[Tensor, Tensor, list[Tensor]]: The output (Tensor[N, C, *]);
        inverse standard deviations (Tensor[C], float32); ``codes`` and
        ``ranges`` and, with a residual, ``act_codes`` and ``act_ranges`` of
        :func:`norm_act`.

    Raises:
        RuntimeError: If the device has no kernels, or an argument is not
            valid.
    """
    require_kernels(input.device)
    input = dense_channels(input)
    if residual is not None:
        residual = with_strides(residual, input.stride())
    output, invstd, *payload = torch.ops.mmactnn.batch_norm_act.default(
        input,
        residual,
        weight,
        bias,
        *settings,
        relu,
        bits,
        act_bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
        offset_tensor,
        rotated,
    )
    return output, invstd, payload[: 2 if residual is None else 4]


def batch_norm_act_(
    input,
    residual,
    weight,
    bias,
    settings,
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
    """:func:`batch_norm_act` in place.

    Args:
        input (Tensor[N, C, *]): Contiguous or dense and channels_last;
            overwritten with the output.
        residual (Tensor[N, C, *], optional): Must not overlap ``input``.
        weight (Tensor[C], optional): See :func:`batch_norm_act`.
        bias (Tensor[C], optional): See :func:`batch_norm_act`.
        settings (NormSettings): See :func:`batch_norm_act`.
        relu (bool): See :func:`batch_norm_act`.
        bits (int): See :func:`batch_norm_act`.
        act_bits (int): See :func:`batch_norm_act`.
        group_size (int, optional): See :func:`batch_norm_act`.
        seed (int): See :func:`batch_norm_act`.
        offset (int, optional): See :func:`batch_norm_act`.
        offset_tensor (Tensor[1], optional): See :func:`batch_norm_act`.
        rotated (bool, optional): See :func:`batch_norm_act`.

    Returns:
        tuple[Tensor, list[Tensor]]: Results of :func:`batch_norm_act` after
        the output.

    Raises:
        RuntimeError: As :func:`batch_norm_act`, or if the input is of another
            layout or overlaps the residual.
    """
    require_kernels(input.device)
    if residual is not None:
        residual = with_strides(residual, input.stride())
    invstd, *payload = torch.ops.mmactnn.batch_norm_act_.default(
        input,
        residual,
        weight,
        bias,
        *settings,
        relu,
        bits,
        act_bits,
        group_size,
        as_int64(seed),
        as_int64(offset),
        offset_tensor,
        rotated,
    )
    return invstd, payload[: 2 if residual is None else 4]


def batch_norm_act_backward(
    grad_output,
    codes,
    ranges,
    act_codes,
    weight,
    invstd,
    relu,
    use_batch_stats,
    needs_input,
    bits,
    act_bits,
    group_size,
    *,
    drawn=None,
):
    """Gradients of :func:`batch_norm_act`.

    Args:
        grad_output (Tensor[N, C, *]): See :func:`norm_grad_sums`.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16; the last
            dimension is 4 after a ReLU without a residual.
        act_codes (Tensor[N, ceil(M / 8) * act_bits], optional): uint8, where
            there was a residual.
        weight (Tensor[C], optional): float32, contiguous.
        invstd (Tensor[C]): float32.
        relu (bool): Whether the output was rectified.
        use_batch_stats (bool): Whether the statistics were those of the batch
            and so depend on the input.
        needs_input (bool): Whether the gradient of the input is wanted.
        bits (int): Bits of ``codes``.
        act_bits (int): Bits of ``act_codes``.
        group_size (int): Elements a range.
        drawn (DrawnBits, optional): See :func:`norm_grad_sums`.

    Returns:
        tuple[tuple[Tensor, Tensor], list[Tensor]]: The gradients of bias and
        weight (Tensor[C], float32); the gradient of the input, if it is
        wanted, and that of the residual, if there was one, both with the
        shape, dtype and strides of ``grad_output``.

    Raises:
        RuntimeError: If the device has no kernels, or an argument is not
            valid.
    """
    require_kernels(grad_output.device)
    results = torch.ops.mmactnn.batch_norm_act_backward.default(
        grad_output,
        codes,
        ranges,
        act_codes,
        weight,
        invstd,
        relu,
        use_batch_stats,
        needs_input,
        bits,
        act_bits,
        group_size,
        *drawn_arguments(drawn),
    )
    return tuple(results[:2]), results[2:]


@fake('batch_norm_act')
def _fake_batch_norm_act(
    input,
    residual,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches_tracked,
    use_batch_stats,
    momentum,
    eps,
    *format,
):
    invstd = input.new_empty((input.shape[1],), dtype=torch.float32)
    output, *payload = fake_norm_act(
        input, residual, invstd, invstd, weight, bias, *format
    )
    return output, invstd, *payload


@fake('batch_norm_act_')
def _fake_batch_norm_act_(*args):
    return _fake_batch_norm_act(*args)[1:]


@fake('batch_norm_act_backward')
def _fake_batch_norm_act_backward(
    grad_output,
    codes,
    ranges,
    act_codes,
    weight,
    invstd,
    relu,
    use_batch_stats,
    needs_input,
    *format,
):
    count = needs_input + (act_codes is not None)
    return [
        *(sums.clone() for sums in empty_sums(grad_output)),
        *(torch.empty_like(grad_output) for _ in range(count)),
    ]
