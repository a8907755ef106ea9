"""Convolutions, each with the normalisation and ReLU behind it, as one.

What a layer costs on the host, small tensors feel: a node of the graph, a call
of a module and of a function. A chain has one node for all of its layers, and
one call of an op in each direction.
"""

from typing import NamedTuple

import torch
from torch.autograd import Function

from .. import ops
from ..codes.payload import PayloadFormat, QuantizedTensor
from ..ops.layout import dense_rows
from .double_backward import first_order_only


class End(NamedTuple):
    """The payload that an output of a chain has.

    Attributes:
        kind (str): Of its codes, ``'split'`` or ``'zeroed'``.
        bits (int): Bits a code.
        group_size (int): Elements a range.
        place (int): Where its codes and ranges are, in what is kept.
        layer (int): Index of the layer.
    """

    kind: str
    bits: int
    group_size: int
    place: int
    layer: int


class Chain(NamedTuple):
    """The layers of a chain.

    Attributes:
        plan (ChainPlan): The links.
        readers (list[LayerQuantizer | None]): For each input, settings of the
            convolution that keeps it; None where it is only added.
        ends (list[End | None]): Payloads of the outputs; None where a layer
            that reads it has to make one.
        casts (bool): Whether parameters have other dtypes than the op takes.
        generator (RoundingGenerator): Source of random bits.
        observed (bool): Whether reports can be made: of the first layer, if
            no other one reads the input.
    """

    plan: ops.ChainPlan
    readers: list
    ends: list
    casts: bool
    generator: object
    observed: bool


class _Call(NamedTuple):
    """A call of a chain.

    Attributes:
        chain (Chain): The layers.
        dtype (torch.dtype, optional): That of autocast.
        buffers (list[Tensor | None]): See :func:`mmactnn.ops.conv_chain`.
        made (list[Payload | None]): Payloads of the outputs, from the
            forward pass.
    """

    chain: Chain
    dtype: torch.dtype | None
    buffers: list
    made: list


class _Chain(Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        chain = call.chain
        count = len(chain.readers)
        inputs, parameters = tensors[:count], tensors[count:]
        xs = inputs
        if call.dtype is not None:
            xs = [x.to(call.dtype) for x in inputs]
        dtype, device = xs[0].dtype, xs[0].device
        ctx.casts = chain.casts or call.dtype is not None
        cast = _cast(parameters, dtype) if ctx.casts else parameters
        kept = _KeptInputs(chain.readers, inputs, xs)
        seed, offset, _ = chain.generator.next(
            device, kept.draws + chain.plan.draws
        )
        outputs, codes, own, ctx.layouts = ops.conv_chain(
            xs,
            cast,
            call.buffers,
            chain.plan,
            kept.encodings,
            seed=seed,
            offset=offset,
        )
        kept.take(codes)
        for output, end in zip(outputs, chain.ends):
            call.made.append(end and _output_payload(end, output, own, cast))
        ctx.adaptive = _first_slot(chain.readers)
        ctx.watch = None
        if chain.observed:
            ctx.watch = kept.watch()
            ctx.format = kept.payloads[0].format
        codes, ctx.formats = kept.to_save(ctx.layouts)
        ctx.save_for_backward(*parameters, *codes, *own)
        ctx.counts = count, len(parameters), len(parameters) + len(codes)
        ctx.plan, ctx.dtype = chain.plan, dtype
        ctx.wide = inputs[0].dtype is torch.float32
        ctx.set_materialize_grads(False)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @first_order_only('A block that is fused')
    def backward(ctx, *grad_outputs):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        inputs, first_code, first_kept = ctx.counts
        parameters = saved[:first_code]
        codes = saved[first_code:first_kept]
        grads = ops.conv_chain_backward(
            grad_outputs,
            codes,
            ctx.formats,
            _cast(parameters, ctx.dtype) if ctx.casts else parameters,
            saved[first_kept:],
            ctx.layouts,
            ctx.plan,
            needs[1 + inputs :],
            needs[1 : 1 + inputs],
            ctx.wide,
            ctx.watch is not None,
            ctx.dtype,
        )
        first, *of_parameters = grads[inputs:]
        if first is not None:
            payload = ctx.format.payload(*codes)
            fan = parameters[0][0].numel()
            ctx.watch.linear(payload, first, of_parameters[0], fan)
        return None, *grads[:inputs], *of_parameters


class _KeptInputs:
    """What is kept of the inputs of a call.

    Args:
        readers (list[LayerQuantizer | None]): See :class:`Chain`.
        inputs (Sequence[Tensor[N, *]]): The inputs ...
        xs (Sequence[Tensor[N, *]]): ... and these, or their casts.

    Attributes:
        payloads (list[Payload | None]): What is kept; None of those that are
            only added, and of those that the op has to make.
        encodings (list[int]): How it is to make them, see
            :func:`mmactnn.ops.conv_chain`.
        draws (int): How many it makes.
    """

    def __init__(self, readers, inputs, xs):
        self.payloads, self.encodings, self.draws = [], [], 0
        self._first, self._is_first, self._xs = readers[0], False, xs
        self._missing = []
        for reader, input, x in zip(readers, inputs, xs):
            payload, encoding = None, ops.NOT_ENCODED
            if reader is not None:
                payload = reader.find_shared(input, x)
                if payload is None:
                    self._is_first |= not self.payloads
                    own = reader.encoding(x.shape[0])
                    if own is None or dense_rows(x) is not x:
                        # The op cannot make it.
                        payload = reader.hand_out(input, x, reader.pack(x))
                    else:
                        place = len(self.payloads)
                        self._missing.append((place, reader, input, x, own))
                        encoding = own
                        self.draws += 1
            self.payloads.append(payload)
            self.encodings += encoding

    def take(self, codes):
        """Take the codes that the op has made."""
        begin = 0
        for place, reader, input, x, encoding in self._missing:
            end, bits = begin + encoding.tensors, encoding.bits
            if encoding.kind is ops.Kept.ROWS:
                bits /= x.shape[0]
            format = PayloadFormat.of(x, bits, encoding.group_size)
            payload = QuantizedTensor(format, *codes[begin:end])
            self.payloads[place] = reader.hand_out(input, x, payload)
            begin = end

    def watch(self):
        """Watch, optional: Of the first input; see ``LayerQuantizer``."""
        return self._first.watch_kept(self.payloads[0], self._is_first)

    def to_save(self, layouts):
        """Tensors of the payloads, and the formats that belong to them.

        Args:
            layouts (Tensor[*]): Where the op has noted the strides of the
                inputs. Those of payloads take their place.

        Returns:
            tuple[list[Tensor | None], list[int]]: Both as
            :func:`mmactnn.ops.conv_chain_backward` takes them.
        """
        codes, formats, place = [], [], 0
        for payload, x in zip(self.payloads, self._xs):
            strides, place = place + 1 + x.dim(), place + 1 + 2 * x.dim()
            if payload is None:
                formats += ops.NOT_ENCODED
                continue
            tensors, format = payload.tensors, payload.format
            if format.stride != x.stride():
                layouts[strides:place] = torch.tensor(format.stride)
            kind = ops.Kept[format.kind.upper()]
            if kind is ops.Kept.PLAIN and len(tensors) == 4:
                kind = ops.Kept.ROWS
            codes += tensors
            formats += kind, int(format.bits), format.group_size
        return codes, formats


def _first_slot(readers):
    """Any slot of what keeps the inputs; None if no bits are shared out."""
    slots = (reader and reader.slot for reader in readers)
    return next((slot for slot in slots if slot is not None), None)


def _output_payload(end, output, kept, parameters):
    tensors = kept[end.place : end.place + 2]
    if end.kind == 'split':
        first = end.layer * ops.PARAMETERS
        tensors += parameters[first + 2 : first + ops.PARAMETERS]
    format = PayloadFormat.of(output, end.bits, end.group_size, end.kind)
    return format.payload(*tensors)


def _cast(parameters, dtype):
    """Those of convolutions in some dtype, the others in float32."""
    return [
        tensor
        if tensor is None or tensor.dtype == wanted
        else tensor.to(wanted)
        for tensor, wanted in zip(
            parameters,
            (dtype, dtype, torch.float32, torch.float32)
            * (len(parameters) // ops.PARAMETERS),
        )
    ]


def run_chain(chain, inputs, parameters, buffers, dtype):
    """Convolutions, normalisations and ReLUs that read one another.

    The outputs and all gradients are those of the layers, called one by one,
    but that the gradients of the outputs live until the backward pass of the
    last layer has ended.

    Args:
        chain (Chain): The layers.
        inputs (Sequence[Tensor[N, C, *]]): float32, float16 or bfloat16, all
            of one dtype; under autocast they are cast to autocast's dtype.
        parameters (list[Tensor | None]): See :func:`mmactnn.ops.conv_chain`,
            but in the dtypes that they have.
        buffers (list[Tensor | None]): See there.
        dtype (torch.dtype, optional): That of autocast, see
            :func:`mmactnn.autograd.autocast.lower_dtype`.

    Returns:
        tuple[Tensor[N, O, *]]: The outputs of the links that no others read.
    """
    call = _Call(chain, dtype, buffers, [])
    outputs = _Chain.apply(call, *inputs, *parameters)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    cache = next(r for r in chain.readers if r is not None).cache
    for output, payload in zip(outputs, call.made):
        if payload is not None:
            cache.put(output, payload)
    return outputs
