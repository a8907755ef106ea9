"""Convolution that keeps its input as codes."""

import math
import weakref
from typing import NamedTuple

import torch
from torch.autograd import Function

from ..codes.calls import Call
from ..codes.payload import WHOLE, pieces
from ..codes.units import MIB
from ..ops.channels import as_memory_format, dims_but_channels, memory_format
from .autocast import cast, lower_dtype
from .double_backward import first_order_only

# Up to this size of the input both gradients come from one call: the host's
# time for a second call then matters more than the memory of both tensors.
_SMALL_BYTES = 32 * MIB

# From this size of the output on the forward pass, too, runs in pieces, each
# of at least this size, and from twice this size of the input. Pieces cost a
# copy of the output; with smaller tensors the backward pass needs more memory
# than the forward pass anyway.
_LARGE_BYTES = 256 * MIB

_CONTIGUOUS = torch.contiguous_format


class _Record(NamedTuple):
    """State of a convolution for its backward pass, besides tensors.

    Attributes:
        geometry (tuple): See :func:`convolution`.
        dtype (torch.dtype, optional): Dtype of autocast.
        size (torch.Size): Shape of the input.
        input_dtype (torch.dtype): Dtype of the input.
        nbytes (int): Bytes of the input after autocast.
        memory_format (torch.memory_format): Memory format of the input.
        bias_dtype (torch.dtype, optional): Dtype of the bias.
        chunk_bytes (int, optional): See ``LayerQuantizer``.
        format (PayloadFormat, optional): Format of the input's payload; None
            if the input is not kept.
        probe (SensitivityProbe, optional): Probe for adaptive precision.
    """

    geometry: tuple
    dtype: torch.dtype | None
    size: torch.Size
    input_dtype: torch.dtype
    nbytes: int
    memory_format: torch.memory_format
    bias_dtype: torch.dtype | None
    chunk_bytes: int | None
    format: object
    probe: object


def _convolve(x, w, b, geometry, limit):
    """Convolve, piece by piece if the input or the output is large.

    Where cuDNN computes in another layout, its workspace holds copies of
    both.
    """
    transposed = geometry[3]
    if transposed:
        return torch.convolution(x, w, b, *geometry)
    limit = max(limit, _LARGE_BYTES)
    # Bytes of the output, but for effects of the edges.
    nbytes = x.nbytes * w.shape[0] / x.shape[1] / math.prod(geometry[0])
    parts = list(pieces(x.shape[0], max(x.nbytes, nbytes), limit))
    if nbytes <= limit and x.nbytes <= 2 * limit or len(parts) == 1:
        return torch.convolution(x, w, b, *geometry)
    output = None
    for part in parts:
        made = torch.convolution(x[part], w, b, *geometry)
        if output is None:
            output = torch.empty(
                (x.shape[0], *made.shape[1:]),
                dtype=made.dtype,
                device=made.device,
                memory_format=memory_format(made),
            )
        output[part] = made
    return output


def all_gradients(record, weight, kept, grad_output, needs):
    """The gradients of input, weight and bias that are wanted.

    The weight is the parameter itself, not its copy in autocast's dtype.
    """
    w = weight if record.dtype is None else weight.to(record.dtype)
    needs_input, needs_weight, needs_bias = needs
    grad_input = grad_weight = grad_bias = None
    if needs_weight:
        payload = record.format.payload(*kept)
        limit = record.chunk_bytes
        if limit is None or record.nbytes <= limit:
            # Both at once only if they are small: they are the largest
            # tensors here, and need not live together.
            wanted = needs_input and record.nbytes <= _SMALL_BYTES
            grad_input, grad_weight, grad_bias = _gradients(
                record,
                grad_output,
                payload.unpack(),
                w,
                (wanted, True, needs_bias),
            )
        else:
            grad_weight, grad_bias = _sums_of_pieces(
                record, weight, w, payload, grad_output, needs_bias
            )
        if record.probe is not None:
            fan = _fan(record.size, grad_output.shape, weight, record.geometry)
            record.probe.linear(payload, grad_output, grad_weight, fan)
    elif needs_bias:
        grad_bias = grad_output.sum(
            dims_but_channels(grad_output), dtype=record.bias_dtype
        )
    if needs_input and grad_input is None:
        grad_input = _input_gradient(record, grad_output, w)
    if grad_input is not None and grad_input.dtype != record.input_dtype:
        grad_input = grad_input.to(record.input_dtype)
    return grad_input, grad_weight, grad_bias


def _sums_of_pieces(record, weight, w, payload, grad_output, needs_bias):
    """The gradients of weight and bias, decoding piece by piece."""
    grad_weight = grad_bias = None
    for part, x in payload.chunks(record.chunk_bytes):
        grad = grad_output if part == WHOLE else grad_output[part]
        _, weight_part, bias_part = _gradients(
            record, grad, x, w, (False, True, needs_bias)
        )
        # Sums are in the dtype of the parameter.
        grad_weight = _add(grad_weight, weight_part, weight.dtype)
        if needs_bias:
            grad_bias = _add(grad_bias, bias_part, record.bias_dtype)
    return grad_weight, grad_bias


class Convolution(Function):
    """Convolution, transposed or not, with the weight's gradient from codes.

    The forward pass and the gradient of the input are exact. The gradient of
    the weight is linear in the input, hence unbiased (ActNN,
    arXiv:2104.14129, Sec. 3.1).

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16; under autocast
            it is cast to autocast's dtype.
        weight (Tensor[O, C / groups, *]): Weight; Tensor[C, O / groups, *]
            if transposed.
        bias (Tensor[O], optional): Bias.
        geometry (tuple): Stride, padding, dilation (tuples of int),
            transposed (bool), output padding (tuple of int) and groups (int),
            as ``torch.ops.aten.convolution`` takes them.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[N, O, *]: The output.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, geometry, quantizer):
        """See ``Function``."""
        # Calls of functions are avoided where possible: for small convolutions
        # they take as long as the convolution itself.
        dtype, x, w, b = None, input, weight, bias
        if torch.is_autocast_enabled(input.device.type):
            dtype = lower_dtype(input)
            x, w, b = cast(dtype, input, weight, bias)
        limit = quantizer.chunk_bytes
        if limit is None or x.nbytes <= _LARGE_BYTES:
            output = torch.convolution(x, w, b, *geometry)
        else:
            output = _convolve(x, w, b, geometry, limit)
        format, kept, probe = quantizer.keep_shared(
            input, x, ctx.needs_input_grad[1]
        )
        ctx.record = _Record(
            geometry,
            dtype,
            x.shape,
            input.dtype,
            x.nbytes,
            _CONTIGUOUS if x.is_contiguous() else memory_format(x),
            None if bias is None else bias.dtype,
            limit,
            format,
            probe,
        )
        ctx.source = weakref.ref(input)
        if quantizer.meter is not None:
            quantizer.record(kept, Call(x, output, w))
        # A normalisation behind reads this from the autograd node.
        ctx.layer_bits = ctx.adaptive = quantizer.layer_bits
        ctx.save_for_backward(weight, *kept)
        return output

    @staticmethod
    @first_order_only('QConv', unless=lambda ctx: ctx.record.format is None)
    def backward(ctx, grad_output):
        """See ``Function``."""
        weight, *kept = ctx.saved_tensors
        grads = all_gradients(
            ctx.record, weight, kept, grad_output, ctx.needs_input_grad[:3]
        )
        return *grads, None, None


def _gradients(record, grad_output, x, w, wanted):
    """Gradients of input, weight and bias, None where not wanted."""
    bias_size = None if record.bias_dtype is None else [grad_output.shape[1]]
    return torch.ops.aten.convolution_backward.default(
        grad_output, x, w, bias_size, *record.geometry, wanted
    )


def _input_gradient(record, grad_output, w):
    """The gradient of the input alone, piece by piece if it is large."""
    if record.memory_format != torch.contiguous_format:
        # Without the input, cuDNN and oneDNN choose their layout by that of
        # the weight.
        w = as_memory_format(w, record.memory_format)
    parts = list(pieces(record.size[0], record.nbytes, record.chunk_bytes))
    if len(parts) == 1:
        return _whole_input_gradient(record, grad_output, w)
    grad_input = torch.empty(
        record.size,
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=record.memory_format,
    )
    for part in parts:
        grad_input[part] = _whole_input_gradient(record, grad_output[part], w)
    return grad_input


def _whole_input_gradient(record, grad_output, w):
    stride, padding, dilation, transposed, _, groups = record.geometry
    size = (grad_output.shape[0], *record.size[1:])
    if grad_output.is_cuda and groups == 1 and not transposed:
        # A transposed convolution runs the same kernels and needs no
        # placeholder for the input.
        kernel = w.shape[2:]
        rest = tuple(
            size[d + 2]
            - (grad_output.shape[d + 2] - 1) * stride[d]
            + 2 * padding[d]
            - dilation[d] * (kernel[d] - 1)
            - 1
            for d in range(len(kernel))
        )
        return torch.convolution(
            grad_output, w, None, stride, padding, dilation, True, rest, 1
        )
    # A placeholder of the input's shape, of which all elements are one number.
    shape_only = torch.empty_strided(
        size, [0] * len(size), dtype=w.dtype, device=w.device
    )
    wanted = True, False, False
    return _gradients(record, grad_output, shape_only, w, wanted)[0]


def _add(total, part, dtype):
    if part.dtype != dtype:
        part = part.to(dtype)
    return part if total is None else total.add_(part)


def _fan(input_size, output_size, weight, geometry):
    """Number of products that each element of the output gradient is in."""
    transposed = geometry[3]
    if not transposed:
        return weight[0].numel()
    positions = math.prod(input_size[2:]) / max(math.prod(output_size[2:]), 1)
    return weight.numel() * positions / output_size[1]


# Not a function around it, which would cost small convolutions another call.
convolution = Convolution.apply
