"""Chains of convolutions with their epilogues, in one op each way.

The results equal those of the single ops, bit for bit. A chain saves the time
between calls: for small tensors it exceeds the time of the kernels.
"""

import enum
from typing import NamedTuple

import torch

from ..extension import require_kernels
from .random_bits import as_int64

__all__ = [
    'ChainPlan',
    'ChainStep',
    'Encoding',
    'Epilogue',
    'NOT_DRAWN',
    'NOT_ENCODED',
    'PARAMETERS',
    'PayloadKind',
    'conv_chain',
    'conv_chain_backward',
    'find_offsets',
    'is_input',
    'source_of_input',
]

# Tensors of a layer: weight and bias of the convolution, scale and shift of
# the normalisation.
PARAMETERS = 4


def source_of_input(index):
    """Reference to an input of the chain, for :attr:`ChainStep.source`.

    Args:
        index (int): Index of the input.

    Returns:
        int: The complement of the index, hence negative.
    """
    return ~index


def is_input(source):
    """Whether a source is an input of the chain; its index is ``~source``.

    Args:
        source (int): See :attr:`ChainStep.source`.
    """
    return source < 0


class Epilogue(enum.IntEnum):
    """Operations fused behind a convolution."""

    NONE = 0
    RELU = 1
    NORM = 2
    NORM_RELU = 3


class PayloadKind(enum.IntEnum):
    """Kinds of payloads that stand for an input of a chain."""

    NONE = -1
    PLAIN = 0
    ROWS = 1
    SPLIT = 2
    ZEROED = 3


class ChainStep(NamedTuple):
    """A convolution with zero padding, and its epilogue.

    Attributes:
        source (int): Tensor that it reads: an input
            (:func:`source_of_input`), or the index of an earlier step, whose
            output must be rectified.
        residual (int, optional): Tensor that is added between normalisation
            and ReLU; an input or the index of an earlier step.
        layer (int): Index of its parameters, buffers and settings.
        stride (tuple[int]): Stride of the convolution.
        padding (tuple[int]): Padding of the convolution.
        dilation (tuple[int]): Dilation of the convolution.
        groups (int): Groups of the convolution.
        epilogue (Epilogue): Operations behind the convolution.
        use_batch_stats (bool): Whether the normalisation uses the statistics
            of the batch.
        bits (int): Bits a code of the epilogue's payload.
        act_bits (int): Bits a code of the output after an addition, else 0.
        group_size (int): Elements a range.
        rounding (str): Rounding of the epilogue's payloads, see
            :class:`mmactnn.Compression`. Defaults to ``'stochastic'``.
    """

    source: int
    residual: int | None
    layer: int
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int
    epilogue: Epilogue
    use_batch_stats: bool
    bits: int
    act_bits: int
    group_size: int
    rounding: str = 'stochastic'

    @property
    def has_norm(self):
        """bool: Whether the epilogue has a normalisation."""
        return self.epilogue in (Epilogue.NORM, Epilogue.NORM_RELU)

    @property
    def conv_arguments(self):
        """tuple: Arguments of ``aten::convolution`` behind the bias."""
        no_output_padding = (0,) * len(self.stride)
        return (
            self.stride,
            self.padding,
            self.dilation,
            False,
            no_output_padding,
            self.groups,
        )

    @property
    def num_saved(self):
        """int: Number of tensors that the epilogue saves."""
        if self.has_norm:
            return 3 if self.residual is None else 5
        return 0 if self.epilogue is Epilogue.NONE else 2


def find_outputs(steps):
    """Indices of the steps whose outputs are those of the chain.

    Args:
        steps (Sequence[ChainStep]): The steps.

    Returns:
        list[int]: Steps that no other one reads, in ascending order.
    """
    read = {s for step in steps for s in (step.source, step.residual)}
    return [i for i in range(len(steps)) if i not in read]


class ChainPlan(NamedTuple):
    """Steps of a chain as lists of numbers, the form that the ops take.

    Attributes:
        numbers (list[int]): The steps, one after the other.
        settings (list[float]): Momentum and eps of each layer's
            normalisation.
        draws (int): Number of payloads that the epilogues round, each of
            which takes an offset.
    """

    numbers: list
    settings: list
    draws: int

    @classmethod
    def of(cls, steps, settings):
        """Make the plan of a chain.

        Args:
            steps (Sequence[ChainStep]): The steps. Outputs that no step reads
                are outputs of the chain.
            settings (Sequence[float]): See the class.

        Returns:
            ChainPlan: The plan.
        """
        numbers = []
        for step in steps:
            adds = step.residual is not None
            numbers += step.source, int(adds)
            numbers += [step.residual] if adds else []
            numbers += step.layer, len(step.stride)
            numbers += *step.stride, *step.padding, *step.dilation
            numbers += (
                step.groups,
                int(step.epilogue),
                int(step.use_batch_stats),
            )
            numbers += step.bits, step.act_bits, step.group_size
        return cls(
            numbers,
            list(settings),
            sum(step.epilogue != Epilogue.NONE for step in steps),
        )


def find_offsets(steps, encoded):
    """Offsets of the random bits of a chain's payloads.

    Args:
        steps (Sequence[ChainStep]): The steps.
        encoded (Sequence[bool]): Whether the op encodes each input.

    Returns:
        tuple[list[int], list[int]]: For each input and for each step the
        offset of its payload, counted from that of the call; 0 where there is
        none.
    """
    of_inputs, of_steps = [0] * len(encoded), [0] * len(steps)
    next_offset, left = 0, list(encoded)
    for i, step in enumerate(steps):
        if is_input(step.source) and left[~step.source]:
            left[~step.source] = False
            of_inputs[~step.source] = next_offset
            next_offset += 1
        if step.epilogue is not Epilogue.NONE:
            of_steps[i] = next_offset
            next_offset += 1
    return of_inputs, of_steps


class Encoding(NamedTuple):
    """Format of the payload that stands for an input of a chain.

    Attributes:
        kind (PayloadKind): Kind of the payload.
        bits (int): Bits a code; for ``ROWS`` the sum over all samples, which
            :func:`mmactnn.ops.allocate_sample_bits` divides among them by
            their ranges.
        group_size (int): Elements a range.
    """

    kind: PayloadKind
    bits: int
    group_size: int

    @property
    def num_tensors(self):
        """int: Number of tensors in the payload that the op makes."""
        return 4 if self.kind is PayloadKind.ROWS else 2


# For payloads whose codes alone are decoded.
NOT_DRAWN = (0, 0, 0)

# For inputs that have a payload already, or that no convolution reads.
NOT_ENCODED = Encoding(PayloadKind.NONE, 0, 0)


def conv_chain(
    inputs,
    parameters,
    buffers,
    plan,
    formats,
    *,
    seed,
    offset=0,
    rotated=False,
):
    """Forward pass of a chain of convolutions with their epilogues.

    The epilogue, :func:`mmactnn.ops.batch_norm_act_` or
    :func:`mmactnn.ops.relu_codes_`, overwrites the output of its convolution
    and takes the next offset. An input to be encoded takes its offset before
    the first convolution that reads it.

    Args:
        inputs (Sequence[Tensor[N, C, *]]): float32, float16 or bfloat16.
            Inputs to be encoded are dense, dimension 0 outermost; inputs to
            be added have the shape and dtype of the other summand.
        parameters (Sequence[Tensor | None]): For each layer the weight and
            bias of its convolution, in the inputs' dtype, then scale and
            shift of its normalisation, float32.
        buffers (Sequence[Tensor | None]): For each layer the first three
            fields of :class:`NormSettings`, which are updated.
        plan (ChainPlan): The steps.
        formats (Sequence[int]): The :class:`Encoding` of each input, one
            after the other: of kind ``PLAIN`` or ``ROWS``, or
            ``NOT_ENCODED``.
        seed (int): Key of the random bits, 64 bits.
        offset (int, optional): Counter of the random bits, 64 bits.
        rotated (bool, optional): Whether codes are rotated, see
            :class:`DrawnBits`. Defaults to False.

    Returns:
        tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]: ``outputs``
        (Tensor[N, O, *]) of the steps that no other one reads; ``codes`` of
        the encoded inputs, as :func:`mmactnn.ops.quantize` or
        :func:`mmactnn.ops.quantize_rows` returns them, the latter followed by
        ``row_bits`` and ``row_starts``; ``kept``, the tensors that the
        epilogues save; ``layouts`` (Tensor[*], int64, on the host), shapes
        and strides of inputs and outputs of convolutions.
        :func:`conv_chain_backward` takes the last three.

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
            rotated,
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
    draws=(),
):
    """Gradients of :func:`conv_chain`.

    Args:
        grad_outputs (Sequence[Tensor[N, O, *] | None]): Gradients of the
            outputs, any strides.
        codes (Sequence[Tensor | None]): Tensors of the inputs' payloads, one
            input after the other.
        formats (Sequence[int]): The :class:`Encoding` of each input, one
            after the other; the bits of ``ROWS`` are ignored.
        parameters (Sequence[Tensor | None]): As in the forward pass.
        kept (Sequence[Tensor]): From the forward pass.
        layouts (Tensor[*]): From the forward pass.
        plan (ChainPlan): As in the forward pass.
        needs (Sequence[bool]): Whether the gradient of each of ``parameters``
            is wanted. A convolution behind anything that wants a gradient
            must want that of its weight.
        needs_inputs (Sequence[bool]): Whether the gradient of each input is
            wanted.
        wide (bool): Whether gradients of an input that several steps read are
            summed in float32, as gradients of parameters are.
        observed (bool): Whether to return the gradient of the first
            convolution's output, too.
        dtype (torch.dtype): Dtype of the inputs.
        draws (Sequence[int], optional): Random bits of the payloads of each
            input and then of each step, one after the other: their
            :attr:`DrawnBits.numbers`, whose ``act_codes`` have
            :meth:`DrawnBits.second`; ``NOT_DRAWN`` where codes alone are
            decoded. Defaults to none.

    Returns:
        list[Tensor | None]: Gradients of the inputs, of the first
        convolution's output, and of the parameters; None where not wanted.

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
            draws,
        )
    except RuntimeError as error:
        _raise_out_of_memory(error)
        raise


def _raise_out_of_memory(error):
    """Raise running out of memory as torch's own class of error.

    The stable API turns every error within an op into a ``RuntimeError``.
    """
    if 'CUDA out of memory' in str(error):
        raise torch.OutOfMemoryError(str(error)) from error
