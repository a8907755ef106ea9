"""Convolutions and what follows each of them, in one call.

The values are those of the ops that these functions stand for. What they save
is the time between two calls, of which small tensors want less than the host.
"""

import enum
import functools

import torch

from ..extension import require_kernels
from .quantize import as_int64

# Tensors that belong to each convolution.
PARAMETERS = 4


class Follows(enum.IntEnum):
    """What follows a convolution."""

    NOTHING = 0
    RELU = 1
    NORM = 2
    NORM_RELU = 3


# How the input of the first convolution may be kept, by the kind of a payload.
_KEPT = dict(plain=0, rows=1, split=2, zeroed=3)


@functools.lru_cache
def plan_link(stride, padding, dilation, groups, follows, of_batch, format):
    """One convolution of a plan.

    Args:
        stride (tuple[int]): Of the convolution.
        padding (tuple[int]): Likewise.
        dilation (tuple[int]): Likewise.
        groups (int): Likewise.
        follows (Follows): What follows it.
        of_batch (bool): Whether the normalisation's statistics are the
            batch's.
        format (tuple[int]): Bits of the codes of what follows, those of
            the output's after an addition (else 0), and the group size.

    Returns:
        tuple[int]: A part of ``plan``; plans are such parts, one after the
        other.
    """
    return (
        len(stride),
        *stride,
        *padding,
        *dilation,
        groups,
        int(follows),
        int(of_batch),
        *format,
    )


def conv_chain(
    input, residual, parameters, buffers, plan, settings, *, seed, offset=0
):
    """The forward pass of convolutions and what follows each of them.

    Each convolution's output is overwritten with what
    :func:`mmactnn.ops.batch_norm_act_` or :func:`mmactnn.ops.relu_codes_`
    makes of it, of which the i-th takes ``offset + i``.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16.
        residual (Tensor[N, O, *], optional): Added to the last normalisation,
            which a ReLU must follow; of the shape and dtype of the output.
        parameters (Sequence[Tensor | None]): Of each convolution its weight
            and bias, of the input's dtype, and scale and shift of its
            normalisation, float32.
        buffers (Sequence[Tensor | None]): Of each convolution the first three
            of :class:`NormSettings`, which are updated.
        plan (Sequence[int]): See :func:`plan_link`.
        settings (Sequence[float]): Of each convolution momentum and eps of
            its normalisation.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 64 bits.

    Returns:
        tuple[Tensor, list[Tensor], list[int]]: The output (Tensor[N, O, *]);
        what the ops returned, but their outputs; shapes and strides of the
        input and of what each convolution returned. The last two are for
        :func:`conv_chain_backward`.

    Raises:
        RuntimeError: If the device has no kernels, or one of the calls
            failed.
    """
    require_kernels(input.device)
    try:
        return torch.ops.mmactnn.conv_chain.default(
            input,
            residual,
            parameters,
            buffers,
            plan,
            settings,
            as_int64(seed),
            as_int64(offset),
        )
    except RuntimeError as error:
        _raise_out_of_memory(error)
        raise


def conv_chain_backward(
    grad_output,
    input_payload,
    parameters,
    kept,
    layouts,
    plan,
    needs,
    needs_input,
    has_residual,
    observed,
):
    """All gradients of :func:`conv_chain`.

    Args:
        grad_output (Tensor[N, O, *]): Gradient of the output, any strides.
        input_payload (tuple): Format (``PayloadFormat``) and tensors
            (Sequence[Tensor | None]) of what is kept of the input.
        parameters (Sequence[Tensor | None]): As in the forward pass.
        kept (Sequence[Tensor]): From the forward pass.
        layouts (Sequence[int]): From the forward pass.
        plan (Sequence[int]): As in the forward pass.
        needs (Sequence[bool]): Whether the gradients of ``parameters`` are
            wanted; those of weights of convolutions must be, where anything
            before them wants one.
        needs_input (bool): Whether that of the input is wanted.
        has_residual (bool): Whether there was a residual.
        observed (bool): Whether the gradient of what the first convolution
            returned is to be returned, too.

    Returns:
        list[Tensor | None]: The gradients of input, residual, what the first
        convolution returned, and parameters; None where not wanted.

    Raises:
        RuntimeError: As :func:`conv_chain`.
    """
    format, codes = input_payload
    kind = (
        'rows' if len(codes) == 4 and format.kind == 'plain' else format.kind
    )
    try:
        return torch.ops.mmactnn.conv_chain_backward.default(
            grad_output,
            codes,
            [_KEPT[kind], int(format.bits), format.group_size],
            parameters,
            kept,
            layouts,
            plan,
            needs,
            needs_input,
            has_residual,
            observed,
            format.dtype,
        )
    except RuntimeError as error:
        _raise_out_of_memory(error)
        raise


def _raise_out_of_memory(error):
    """Tell the error of which torch has a class of its own.

    A call within the op loses the class.
    """
    if 'CUDA out of memory' in str(error):
        raise torch.OutOfMemoryError(str(error)) from error
