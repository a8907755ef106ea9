"""Dropout whose mask is generated from a seed, forward and backward."""

import torch

from ._fake import fake
from .layout import dense
from .quantize import check_input

__all__ = ['dropout', 'dropout_']


def dropout(input, p, seed, offset=0, offset_tensor=None):
    """Drop elements at random, and scale the others.

    An element is dropped where its 16 random bits (Philox, one number an
    element in memory order) are less than t = round(65536 p), but at most
    65535; the others are multiplied by 65536 / (65536 - t), so that the
    expectation is that of the input whatever the rounding of p. A dropped
    element is multiplied by 0: as in torch NaN and inf become NaN.

    The op is linear, and the mask does not depend on the values: applied to
    the gradient with the same seed and offset it is its own backward pass.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16, any dense layout;
            others are copied first.
        p (float): Probability to drop an element, in [0, 1).
        seed (int): Key of the random bits, signed 64 bits.
        offset (int, optional): Counter of the random bits, signed 64 bits.
            Defaults to 0.
        offset_tensor (Tensor[1], optional): As in
            :func:`mmactnn.ops.quantize`.

    Returns:
        Tensor[*]: The output, in the input's layout.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, p is not in [0, 1), or
            ``offset_tensor`` is not valid.
    """
    check_input(input)
    return torch.ops.mmactnn.dropout.default(
        dense(input), p, seed, offset, offset_tensor
    )


def dropout_(input, p, seed, offset=0, offset_tensor=None):
    """:func:`dropout` in place.

    Args:
        input (Tensor[*]): float32, float16 or bfloat16, dense; overwritten.
        p (float): See :func:`dropout`.
        seed (int): See :func:`dropout`.
        offset (int, optional): See :func:`dropout`.
        offset_tensor (Tensor[1], optional): See :func:`dropout`.

    Returns:
        Tensor[*]: ``input``.

    Raises:
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, p is not in [0, 1),
            ``offset_tensor`` is not valid, or the tensor is not dense.
    """
    check_input(input)
    torch.ops.mmactnn.dropout_.default(input, p, seed, offset, offset_tensor)
    return input


@fake('dropout')
def _fake_dropout(input, p, seed, offset, offset_tensor=None):
    return torch.empty_like(input)


@fake('dropout_')
def _fake_dropout_(input, p, seed, offset, offset_tensor=None):
    pass
