"""Gradients of a fused normalisation from its codes."""

import torch

from ._fake import empty_sums, fake
from .channel_stats import check_channels, check_vector
from .quantize import check_format
from .random_bits import drawn_arguments
from .rectified import check_rectified_format

__all__ = ['norm_add_grad_sums', 'norm_grad_input', 'norm_grad_sums']


def _check(grad_output, bits, group_size, relu):
    check_format(bits, group_size)
    if relu:
        check_rectified_format(bits, group_size)
    check_channels(grad_output, 'grad_output')


def norm_grad_sums(
    grad_output, codes, ranges, bits, group_size, relu, *, drawn=None
):
    """Sums over each channel of a normalisation's gradient.

    The gradients of bias, weight and input of a batch normalisation are made
    from them, see :func:`norm_grad_input`. The sums are accurate to float32,
    and their order is fixed on a device.

    Args:
        grad_output (Tensor[N, C, *]): float32, float16 or bfloat16, of 2 to 5
            dimensions, with the strides of the normalised input, contiguous
            or channels_last.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, from
            :func:`mmactnn.ops.norm_act` for M elements a sample; plain codes
            of the normalised input or, with ``relu``, split codes.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16; with ``relu``
            the last dimension is 4, or 3 if the codes are rotated.
        bits (int): Bits a code, from 1 to 8, with ``relu`` from 2.
        group_size (int): Elements a range: 64, 128, 256 or 512.
        relu (bool): Whether a ReLU follows, whose mask the codes hold.
        drawn (DrawnBits, optional): Random bits that the normalised input was
            rounded with. Defaults to none: codes alone are decoded.

    Returns:
        Tensor[2, C]: float32, sums over each channel of the gradients that
        pass the ReLU, and of their products with the normalised input.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid, or
            ``grad_output`` has not 2 to 5 dimensions.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, the layout is another, or
            codes, ranges and gradient do not belong together.
    """
    _check(grad_output, bits, group_size, relu)
    return torch.ops.mmactnn.norm_grad_sums.default(
        grad_output,
        codes,
        ranges,
        bits,
        group_size,
        relu,
        *drawn_arguments(drawn),
    )


def norm_add_grad_sums(
    grad_output,
    codes,
    ranges,
    act_codes,
    bits,
    act_bits,
    group_size,
    *,
    drawn=None,
):
    """:func:`norm_grad_sums` behind a ReLU of a residual sum.

    Args:
        grad_output (Tensor[N, C, *]): As in :func:`norm_grad_sums`.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, plain codes of the
            normalised input.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        act_codes (Tensor[N, ceil(M / 8) * act_bits]): uint8, zeroed codes of
            the output of the ReLU, which tell where the gradient passes.
        bits (int): Bits a code of ``codes``, from 1 to 8.
        act_bits (int): Bits a code of ``act_codes``, from 2 to 8.
        group_size (int): Elements a range: 64, 128, 256 or 512.
        drawn (DrawnBits, optional): As in :func:`norm_grad_sums`.

    Returns:
        tuple[Tensor, Tensor]: The gradient of the sum before the ReLU
        (Tensor[N, C, *], dtype and strides of ``grad_output``), which is also
        that of the residual; the sums of :func:`norm_grad_sums`.

    Raises:
        ValueError: If a width or ``group_size`` is not valid, or
            ``grad_output`` has not 2 to 5 dimensions.
        TypeError: If the dtype is not supported.
        RuntimeError: As in :func:`norm_grad_sums`.
    """
    _check(grad_output, bits, group_size, relu=False)
    check_rectified_format(act_bits, group_size, 'act_bits')
    return torch.ops.mmactnn.norm_add_grad_sums.default(
        grad_output,
        codes,
        ranges,
        act_codes,
        bits,
        act_bits,
        group_size,
        *drawn_arguments(drawn),
    )


def norm_grad_input(
    grad_output,
    codes,
    ranges,
    scale,
    means,
    bits,
    group_size,
    relu,
    *,
    drawn=None,
):
    """Gradient of a normalisation's input.

    ``(g - means[0] - normal * means[1]) * scale``, where g is the gradient if
    it passes the ReLU, else 0, and ``normal`` the decoded normalised input;
    each operation is rounded to float32.

    Args:
        grad_output (Tensor[N, C, *]): As in :func:`norm_grad_sums`; after a
            residual sum the gradient that :func:`norm_add_grad_sums` returned.
        codes (Tensor[N, ceil(M / 8) * bits]): As there.
        ranges (Tensor[N, ceil(M / group_size), 2]): As there.
        scale (Tensor[C]): float32, contiguous: the weight over the standard
            deviation.
        means (Tensor[2, C]): float32, contiguous: the sums over the number of
            elements of a channel; 0 where the statistics are constants.
        bits (int): Bits a code, from 1 to 8, with ``relu`` from 2.
        group_size (int): Elements a range: 64, 128, 256 or 512.
        relu (bool): Whether the codes are split ones.
        drawn (DrawnBits, optional): As in :func:`norm_grad_sums`.

    Returns:
        Tensor[N, C, *]: Of the dtype and the strides of ``grad_output``.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid, ``scale`` or
            ``means`` of another shape, or ``grad_output`` has not 2 to 5
            dimensions.
        TypeError: If the dtype is not supported.
        RuntimeError: As in :func:`norm_grad_sums`.
    """
    _check(grad_output, bits, group_size, relu)
    channels = grad_output.shape[1]
    check_vector(scale, (channels,), 'scale')
    check_vector(means, (2, channels), 'means')
    return torch.ops.mmactnn.norm_grad_input.default(
        grad_output,
        codes,
        ranges,
        scale,
        means,
        bits,
        group_size,
        relu,
        *drawn_arguments(drawn),
    )


@fake('norm_grad_sums')
def _fake_norm_grad_sums(grad_output, *format):
    return empty_sums(grad_output)


@fake('norm_add_grad_sums')
def _fake_norm_add_grad_sums(grad_output, *format):
    return torch.empty_like(grad_output), empty_sums(grad_output)


@fake('norm_grad_input')
def _fake_norm_grad_input(grad_output, *format):
    return torch.empty_like(grad_output)
