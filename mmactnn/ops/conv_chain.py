"""Convolutions and what follows each of them, in one call.

The values are those of the ops that these functions stand for. What they save
is the time between two calls, of which small tensors want less than the host.
"""

import enum
from typing import NamedTuple

import torch

from ..extension import require_kernels
from .quantize import as_int64

__all__ = [
    'ChainPlan',
    'Encoding',
    'Follows',
    'Kept',
    'Link',
    'NOT_ENCODED',
    'PARAMETERS',
    'conv_chain',
    'conv_chain_backward',
    'is_input',
    'source_of_input',
]

# Tensors that belong to each convolution.
PARAMETERS = 4


def source_of_input(index):
    """What stands for an input in :attr:`Link.source`.

    Args:
        index (int): Which input.
    """
    return ~index


def is_input(source):
    """Whether a link reads an input, which is then ``~source``.

    Args:
        source (int): See :attr:`Link.source`.
    """
    return source < 0


class Follows(enum.IntEnum):
    """What follows a convolution."""

    NOTHING = 0
    RELU = 1
    NORM = 2
    NORM_RELU = 3


class Kept(enum.IntEnum):
    """How an input of a chain is kept, by the kind of its payload."""

    NOTHING = -1
    PLAIN = 0
    ROWS = 1
    SPLIT = 2
    ZEROED = 3


class Link(NamedTuple):
    """A convolution with zero padding, and what follows it.

    Attributes:
        source (int): What it reads: the output of a link before it, by its
            index, which must be rectified; or an input
            (:func:`source_of_input`).
        added (int, optional): What is added after the normalisation, before
            the ReLU, likewise.
        layer (int): Which of the parameters and buffers are its.
        stride (tuple[int]): Of the convolution.
        padding (tuple[int]): Likewise.
        dilation (tuple[int]): Likewise.
        groups (int): Likewise.
        follows (Follows): What follows it.
        of_batch (bool): Whether the normalisation's statistics are the
            batch's.
        bits (int): Of the codes of what follows.
        act_bits (int): Of those of the output after an addition, else 0.
        group_size (int): Elements a range.
    """

    source: int
    added: int | None
    layer: int
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int
    follows: Follows
    of_batch: bool
    bits: int
    act_bits: int
    group_size: int

    @property
    def kept(self):
        """int: How many tensors are kept of what follows."""
        if self.follows is Follows.NOTHING:
            return 0
        if self.follows is Follows.RELU:
            return 2
        return 3 if self.added is None else 5


class ChainPlan(NamedTuple):
    """The links of a chain, as the ops take them.

    Attributes:
        numbers (list[int]): The links, one after the other.
        settings (list[float]): Momentum and eps of each layer's
            normalisation.
        draws (int): How many tensors are rounded, but for the inputs.
    """

    numbers: list
    settings: list
    draws: int

    @classmethod
    def of(cls, links, settings):
        """The plan of some links.

        Args:
            links (Sequence[Link]): The links. The outputs of those that no
                other one reads are the chain's.
            settings (Sequence[float]): See the class.

        Returns:
            ChainPlan: The plan.
        """
        numbers = []
        for link in links:
            adds = link.added is not None
            numbers += link.source, int(adds)
            numbers += [link.added] if adds else []
            numbers += link.layer, len(link.stride)
            numbers += *link.stride, *link.padding, *link.dilation
            numbers += link.groups, int(link.follows), int(link.of_batch)
            numbers += link.bits, link.act_bits, link.group_size
        return cls(
            numbers,
            list(settings),
            sum(link.follows != Follows.NOTHING for link in links),
        )


class Encoding(NamedTuple):
    """How an input of a chain is kept.

    Attributes:
        kind (Kept): How.
        bits (int): Bits a code; for ``ROWS`` those of all samples together,
            which share them out by their ranges
            (:func:`mmactnn.ops.split_bits`).
        group_size (int): Elements a range.
    """

    kind: Kept
    bits: int
    group_size: int

    @property
    def tensors(self):
        """int: How many tensors the op makes of an input."""
        return 4 if self.kind is Kept.ROWS else 2


# Of an input that has codes already, or that no convolution reads.
NOT_ENCODED = Encoding(Kept.NOTHING, 0, 0)


def conv_chain(inputs, parameters, buffers, plan, formats, *, seed, offset=0):
    """The forward pass of convolutions and what follows each of them.

    Each convolution's output is overwritten with what
    :func:`mmactnn.ops.batch_norm_act_` or :func:`mmactnn.ops.relu_codes_`
    makes of it. Each of these takes the next offset, and an input that is
    encoded does so before the first convolution that reads it.

    Args:
        inputs (Sequence[Tensor[N, C, *]]): float32, float16 or bfloat16.
            Those that are encoded are dense, dimension 0 outermost; those
            that are added have shape and dtype of what they are added to.
        parameters (Sequence[Tensor | None]): Of each layer the weight and
            bias of its convolution, of the inputs' dtype, and scale and shift
            of its normalisation, float32.
        buffers (Sequence[Tensor | None]): Of each layer the first three of
            :class:`NormSettings`, which are updated.
        plan (ChainPlan): The links.
        formats (Sequence[int]): Of each input, one after the other, its
            :class:`Encoding` as ``PLAIN`` or ``ROWS``, or ``NOT_ENCODED``.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 64 bits.

    Returns:
        tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]: The outputs
        (Tensor[N, O, *]) of the links that no other one reads; codes of the
        inputs that are encoded, as :func:`mmactnn.ops.quantize` or
        :func:`mmactnn.ops.quantize_rows` returns them, in the latter case
        with bits and first bits of the samples; what the other ops returned,
        but their outputs; shapes and strides of inputs and of what each
        convolution returned. The last two are for
        :func:`conv_chain_backward`.

    Raises:
        RuntimeError: If the device has no kernels, or one of the calls
            failed.
    """
    require_kernels(inputs[0].device)
    try:
        return torch.ops.mmactnn.conv_chain.default(
            inputs,
            parameters,
            buffers,
            plan.numbers,
            plan.settings,
            formats,
            as_int64(seed),
            as_int64(offset),
        )
    except RuntimeError as error:
        _raise_out_of_memory(error)
        raise


def conv_chain_backward(
    grad_outputs,
    codes,
    formats,
    parameters,
    kept,
    layouts,
    plan,
    needs,
    needs_inputs,
    wide,
    observed,
    dtype,
):
    """All gradients of :func:`conv_chain`.

    Args:
        grad_outputs (Sequence[Tensor[N, O, *] | None]): Gradients of the
            outputs, any strides.
        codes (Sequence[Tensor | None]): What is kept of the inputs, one
            after the other.
        formats (Sequence[int]): Of each input, one after the other, its
            :class:`Encoding`; the bits of ``ROWS`` are not looked at.
        parameters (Sequence[Tensor | None]): As in the forward pass.
        kept (Sequence[Tensor]): From the forward pass.
        layouts (Tensor[*]): From the forward pass.
        plan (ChainPlan): As in the forward pass.
        needs (Sequence[bool]): Whether the gradients of ``parameters`` are
            wanted; those of weights of convolutions must be, where anything
            before them wants one.
        needs_inputs (Sequence[bool]): Whether those of the inputs are wanted.
        wide (bool): Whether those of an input that several links read are
            summed in float32, as those of parameters are.
        observed (bool): Whether the gradient of what the first link's
            convolution returned is to be returned, too.
        dtype (torch.dtype): Of the inputs.

    Returns:
        list[Tensor | None]: The gradients of inputs, what the first link's
        convolution returned, and parameters; None where not wanted.

    Raises:
        RuntimeError: As :func:`conv_chain`.
    """
    try:
        return torch.ops.mmactnn.conv_chain_backward.default(
            grad_outputs,
            codes,
            formats,
            parameters,
            kept,
            layouts.tolist(),
            plan.numbers,
            needs,
            needs_inputs,
            wide,
            observed,
            dtype,
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
