"""Smooth activations: codes of their derivatives, or of their inputs."""

from typing import NamedTuple

import torch

from ._fake import ceil_div, fake
from .layout import dense
from .quantize import (
    DEFAULT_GROUP_SIZE,
    VALID_BITS,
    check_dtype,
    check_format,
    check_input,
    check_rows,
)
from .random_bits import as_int64, drawn_arguments

__all__ = [
    'Smooth',
    'smooth_decode',
    'smooth_decode_backward',
    'smooth_derivative',
    'smooth_derivative_backward',
]

# Elements that share a flag behind the codes of a derivative.
FLAGGED = 256


class Smooth(NamedTuple):
    """A function of one number, as an activation applies it to all elements.

    Kernels know the functions that the class methods make, by number
    (``csrc/common/smooth.h``).

    Attributes:
        function (int): Its number.
        low (float): Lower bound of the derivative.
        high (float): Upper bound of the derivative.
        parameters (tuple[float, float]): Its parameters; 0 where it has none.
        bits (int, optional): Bits of a derivative that has 2 values only,
            ``low`` and ``high``: its codes are exact without dither. None for
            others.
        one_code (bool): Whether codes of the input serve both value and
            derivative: not of functions that saturate on both sides, whose
            inputs have a range without a bound, and not where the first or
            second derivative jumps, which corrections do not know.
    """

    function: int
    low: float
    high: float
    parameters: tuple = (0.0, 0.0)
    bits: int | None = None
    one_code: bool = False

    @classmethod
    def gelu(cls, approximate='none'):
        """``F.gelu``.

        Args:
            approximate (str, optional): ``'none'`` or ``'tanh'``. Defaults
                to ``'none'``.

        Raises:
            ValueError: If it is neither.
        """
        if approximate not in ('none', 'tanh'):
            raise ValueError(
                f"approximate must be 'none' or 'tanh', got {approximate!r}"
            )
        return cls(int(approximate == 'tanh'), -0.13, 1.13, one_code=True)

    @classmethod
    def silu(cls):
        """``F.silu``."""
        return cls(2, -0.1, 1.1, one_code=True)

    @classmethod
    def mish(cls):
        """``F.mish``."""
        return cls(3, -0.113, 1.089, one_code=True)

    @classmethod
    def hardswish(cls):
        """``F.hardswish``."""
        return cls(4, -0.5, 1.5)

    @classmethod
    def elu(cls, alpha=1.0):
        """``F.elu``.

        Args:
            alpha (float, optional): Factor of the exponential. Defaults to 1.
        """
        bounds = min(0.0, alpha), max(1.0, alpha)
        return cls(5, *bounds, (alpha, 0.0))

    @classmethod
    def sigmoid(cls):
        """``torch.sigmoid``."""
        return cls(6, 0.0, 0.25)

    @classmethod
    def tanh(cls):
        """``torch.tanh``."""
        return cls(7, 0.0, 1.0)

    @classmethod
    def softplus(cls, beta=1.0, threshold=20.0):
        """``F.softplus``.

        Args:
            beta (float, optional): Factor of the input. Defaults to 1.
            threshold (float, optional): Value of ``beta * input`` above which
                it is the identity. Defaults to 20.
        """
        return cls(8, 0.0, 1.0, (beta, threshold), one_code=threshold >= 10)

    @classmethod
    def hardsigmoid(cls):
        """``F.hardsigmoid``."""
        return cls(9, 0.0, 1 / 6, bits=1)

    @classmethod
    def clamp(cls, low, high):
        """``torch.clamp``.

        Args:
            low (float): Least value.
            high (float): Largest value.
        """
        return cls(10, 0.0, 1.0, (low, high), bits=1)


def smooth_derivative(
    input, smooth, bits, *, seed, offset=0, offset_tensor=None
):
    """Codes of a function's derivative.

    Its range is that of the function, so that there are no ranges to keep:
    code c stands for ``low + c * (high - low) / (2 ** bits - 1)``. Codes are
    rounded as in :func:`quantize`.

    Args:
        input (Tensor[*]): Argument of the function; float32, float16 or
            bfloat16, any dense layout; others are copied first.
        smooth (Smooth): The function.
        bits (int): Bits a code, from 1 to 8.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 64 bits. Defaults
            to 0.
        offset_tensor (Tensor[1], optional): As in :func:`quantize`.

    Returns:
        Tensor[ceil(numel / 8) * bits + ceil(numel / 256)]: uint8: the codes
        in memory order, and for every 256 elements a byte that is 1 where a
        derivative is not a finite number, else 0.

    Raises:
        ValueError: If ``bits`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or ``offset_tensor`` is
            not valid.
    """
    _check_bits(bits)
    check_input(input)
    return torch.ops.mmactnn.smooth_derivative.default(
        dense(input),
        smooth.function,
        smooth.parameters,
        smooth.low,
        smooth.high,
        bits,
        as_int64(seed),
        as_int64(offset),
        offset_tensor,
    )


def smooth_derivative_backward(grad_output, codes, smooth, bits, *, drawn):
    """Product of a gradient and a derivative that was kept as codes.

    Args:
        grad_output (Tensor[*]): In the memory order of the input.
        codes (Tensor[*]): uint8, from :func:`smooth_derivative`.
        smooth (Smooth): The function.
        bits (int): Bits a code, from 1 to 8.
        drawn (DrawnBits, optional): Random bits that the derivative was
            rounded with; None: codes alone are decoded.

    Returns:
        Tensor[*]: The gradient of the input, in the dtype of
        ``grad_output``; NaN for all of 256 elements of which one has a
        derivative that is not a finite number.

    Raises:
        ValueError: If ``bits`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or the codes do not fit.
    """
    _check_bits(bits)
    check_input(grad_output)
    return torch.ops.mmactnn.smooth_derivative_backward.default(
        grad_output,
        codes,
        smooth.low,
        smooth.high,
        bits,
        *drawn_arguments(drawn),
    )


def smooth_decode(
    codes,
    ranges,
    size,
    stride,
    dtype,
    smooth,
    bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    drawn=None,
    weight=None,
    bias=None,
):
    """Value of a function of which the argument was kept as codes.

    Of a decoded argument h, whose variance of rounding s^2 follows from the
    range, it is ``G(h) - s^2 / 2 G''(h)``, the expectation of which is G of
    the argument but for terms of fourth order in s. Dither is subtracted in
    all groups, also where ``low`` is 0.

    Args:
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, from :func:`quantize`,
            not rotated.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        size (Sequence[int]): Shape of the result, N first.
        stride (Sequence[int]): Strides of the result, those of the argument.
        dtype (torch.dtype): float32, float16 or bfloat16.
        smooth (Smooth): The function.
        bits (int): Bits a code, from 1 to 8.
        group_size (int, optional): Elements a range. Defaults to 256.
        drawn (DrawnBits, optional): Random bits that the argument was rounded
            with. Defaults to none: codes alone are decoded, whose variance is
            taken for that of stochastic rounding on average.
        weight (Tensor[C], optional): float32, scale of a normalisation: codes
            are those of the value before it. The tensor is then [N, C, *],
            contiguous or dense and channels_last. Defaults to 1.
        bias (Tensor[C], optional): float32, added to that. Defaults to 0.

    Returns:
        Tensor[N, *]: The values, of ``dtype`` and ``stride``.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or codes, ranges and size
            do not belong together.
    """
    check_format(bits, group_size)
    check_dtype(dtype)
    return torch.ops.mmactnn.smooth_decode.default(
        codes,
        ranges,
        size,
        stride,
        dtype,
        smooth.function,
        smooth.parameters,
        bits,
        group_size,
        *drawn_arguments(drawn),
        weight,
        bias,
    )


def smooth_decode_backward(
    grad_output,
    codes,
    ranges,
    smooth,
    bits,
    group_size=DEFAULT_GROUP_SIZE,
    *,
    drawn=None,
    weight=None,
    bias=None,
):
    """Gradient of a function of which the argument was kept as codes.

    The derivative is ``G'(h) - s^2 / 2 G'''(h)``, see :func:`smooth_decode`.

    Args:
        grad_output (Tensor[N, *]): Gradient, with the strides of the
            argument.
        codes (Tensor[N, ceil(M / 8) * bits]): See :func:`smooth_decode`.
        ranges (Tensor[N, ceil(M / group_size), 2]): See there.
        smooth (Smooth): The function.
        bits (int): Bits a code, from 1 to 8.
        group_size (int, optional): Elements a range. Defaults to 256.
        drawn (DrawnBits, optional): See :func:`smooth_decode`.
        weight (Tensor[C], optional): See there.
        bias (Tensor[C], optional): See there.

    Returns:
        Tensor[N, *]: The gradient of the argument of the function, which is
        the output of the normalisation, if there is one.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid, or
            ``grad_output`` has no dimension.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, or codes, ranges and
            gradient do not belong together.
    """
    check_format(bits, group_size)
    check_rows(grad_output)
    return torch.ops.mmactnn.smooth_decode_backward.default(
        grad_output,
        codes,
        ranges,
        smooth.function,
        smooth.parameters,
        bits,
        group_size,
        *drawn_arguments(drawn),
        weight,
        bias,
    )


def _check_bits(bits):
    if bits not in VALID_BITS:
        raise ValueError(f'bits must be an integer from 1 to 8, got {bits!r}')


@fake('smooth_derivative')
def _fake_smooth_derivative(
    input, function, parameters, low, high, bits, *rounding
):
    numel = input.numel()
    size = ceil_div(numel, 8) * bits + ceil_div(ceil_div(numel, 8), 32)
    return input.new_empty((size,), dtype=torch.uint8)


@fake('smooth_derivative_backward')
def _fake_smooth_derivative_backward(grad_output, *format):
    return torch.empty_like(grad_output)


@fake('smooth_decode')
def _fake_smooth_decode(codes, ranges, size, stride, dtype, *format):
    return codes.new_empty_strided(size, stride, dtype=dtype)


@fake('smooth_decode_backward')
def _fake_smooth_decode_backward(grad_output, *format):
    return torch.empty_like(grad_output)
