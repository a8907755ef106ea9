"""Autograd function of a chain of conv-norm-act layers.

For small tensors the host limits training: every layer costs an autograd
node, a call of a module and one of a function. A chain has one node for all
of its layers, and one call of an op in each direction.
"""

from typing import NamedTuple

import torch
from torch.autograd import Function

from .. import ops
from ..codes.hooks import keep_tensors
from ..codes.payload import PayloadFormat, QuantizedTensor
from ..codes.saved_bits import to_cpu
from ..ops.layout import dense_rows
from .double_backward import first_order_only

_KINDS = {kind.name.lower(): kind for kind in ops.PayloadKind}


class OutputPayload(NamedTuple):
    """Format of the payload that stands for an output of a chain.

    Attributes:
        kind (str): Kind of the codes, ``'split'`` or ``'zeroed'``.
        bits (int): Bits a code.
        group_size (int): Elements a range.
        place (int): Index of its codes among the tensors that the op keeps;
            its ranges follow.
        layer (int): Index of the layer.
        step (int): Index of the step.
        follows_sum (bool): Whether the output is that of an addition.
    """

    kind: str
    bits: int
    group_size: int
    place: int
    layer: int
    step: int
    follows_sum: bool


class Chain(NamedTuple):
    """Layers of a chain, ready to run.

    Attributes:
        plan (ChainPlan): The steps, for the op.
        steps (list[ChainStep]): The steps.
        input_quantizers (list[LayerQuantizer | None]): For each input the
            quantizer of the convolution that keeps it; None for an input
            that is only added.
        output_payloads (list[OutputPayload | None]): Payloads of the outputs;
            None where the next layer has to make one.
        casts (bool): Whether parameters have other dtypes than the op takes.
        generator (RoundingGenerator): Source of random bits.
        rotated (bool): Whether payloads are rotated.
        observed (bool): Whether the chain can report to adaptive precision:
            for the first layer, if no other one reads an input.
        offsets (dict): Results of :func:`mmactnn.ops.find_offsets` so far, by
            the inputs that the op encodes.
    """

    plan: ops.ChainPlan
    steps: list
    input_quantizers: list
    output_payloads: list
    casts: bool
    generator: object
    rotated: bool
    observed: bool
    offsets: dict

    def find_offsets(self, encoded):
        """See :func:`mmactnn.ops.find_offsets`.

        Args:
            encoded (tuple[bool]): Whether the op encodes each input.
        """
        found = self.offsets.get(encoded)
        if found is None:
            found = ops.find_offsets(self.steps, encoded)
            self.offsets[encoded] = found
        return found


class _Call(NamedTuple):
    """A call of a chain.

    Attributes:
        chain (Chain): The layers.
        dtype (torch.dtype, optional): That of autocast.
        buffers (list[Tensor | None]): See :func:`mmactnn.ops.conv_chain`.
        payloads (list[Payload | None]): Payloads of the outputs, from the
            forward pass.
    """

    chain: Chain
    dtype: torch.dtype | None
    buffers: list
    payloads: list


class _Chain(Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        chain = call.chain
        count = len(chain.input_quantizers)
        inputs, parameters = tensors[:count], tensors[count:]
        xs = inputs
        if call.dtype is not None:
            xs = [x.to(call.dtype) for x in inputs]
        dtype, device = xs[0].dtype, xs[0].device
        ctx.casts = chain.casts or call.dtype is not None
        cast = _cast(parameters, dtype) if ctx.casts else parameters
        payloads = _InputPayloads(chain.input_quantizers, inputs, xs)
        draw = chain.generator.next(device, payloads.draws + chain.plan.draws)
        offsets = chain.find_offsets(payloads.encoded)
        outputs, codes, own, ctx.layouts = ops.conv_chain(
            xs,
            cast,
            call.buffers,
            chain.plan,
            payloads.encodings,
            seed=draw.seed,
            offset=draw.offset,
            rotated=chain.rotated,
        )
        payloads.take(codes, draw, offsets[0])
        drawn = [
            ops.DrawnBits.of(step.rounding, draw.seed, draw.offset + place)
            for step, place in zip(chain.steps, offsets[1])
        ]
        for output, spec in zip(outputs, chain.output_payloads):
            payload = None
            if spec is not None:
                payload = _output_payload(spec, output, own, cast, drawn)
            call.payloads.append(payload)
        ctx.adaptive = _first_layer_bits(chain.input_quantizers)
        ctx.probe = None
        if chain.observed:
            ctx.probe = payloads.probe()
            ctx.format = payloads.payloads[0].format
        codes, ctx.formats, ctx.draws = payloads.to_save(ctx.layouts)
        for of_step in drawn:
            ctx.draws += of_step.numbers if of_step else ops.NOT_DRAWN
        ctx.counts = count, len(parameters), len(parameters) + len(codes)
        if keep_tensors():
            ctx.save_for_backward(*parameters, *codes, *own)
        else:
            numbers, ctx.draws = to_cpu(ctx.draws), None
            ctx.save_for_backward(*parameters, *codes, *own, numbers)
        ctx.plan, ctx.dtype = chain.plan, dtype
        ctx.wide = inputs[0].dtype is torch.float32
        ctx.set_materialize_grads(False)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @first_order_only('A block that is fused')
    def backward(ctx, *grad_outputs):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        draws = ctx.draws
        if draws is None:
            *saved, numbers = saved
            draws = numbers.tolist()
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
            ctx.probe is not None,
            ctx.dtype,
            draws,
        )
        first, *of_parameters = grads[inputs:]
        if first is not None:
            # For its variance, which depends on no random bits.
            payload = ctx.format.make(*codes)
            fan = parameters[0][0].numel()
            ctx.probe.linear(payload, first, of_parameters[0], fan)
        return None, *grads[:inputs], *of_parameters


class _InputPayloads:
    """Payloads of the inputs of a call.

    Args:
        quantizers (list[LayerQuantizer | None]): Quantizer of each input, see
            :attr:`Chain.input_quantizers`.
        inputs (Sequence[Tensor[N, *]]): The inputs.
        xs (Sequence[Tensor[N, *]]): The inputs, cast to autocast's dtype.

    Attributes:
        payloads (list[Payload | None]): Payload of each input; None where it
            is only added, and until :meth:`take` where the op makes it.
        encodings (list[int]): Formats of the payloads that the op makes, see
            :func:`mmactnn.ops.conv_chain`.
        draws (int): Number of payloads that the op makes.
    """

    def __init__(self, quantizers, inputs, xs):
        self.payloads, self.encodings, self.draws = [], [], 0
        self._first, self._is_first, self._xs = quantizers[0], False, xs
        self._missing = []
        for quantizer, input, x in zip(quantizers, inputs, xs):
            payload, encoding = None, ops.NOT_ENCODED
            if quantizer is not None:
                payload = quantizer.find_shared(input, x)
                if payload is None:
                    self._is_first |= not self.payloads
                    own = quantizer.encoding(x.shape[0])
                    if own is None or dense_rows(x) is not x:
                        # The op cannot make it.
                        payload = quantizer.publish(
                            input, x, quantizer.pack(x)
                        )
                    else:
                        place = len(self.payloads)
                        self._missing.append((place, quantizer, input, x, own))
                        encoding = own
                        self.draws += 1
            self.payloads.append(payload)
            self.encodings += encoding

    @property
    def encoded(self):
        """tuple[bool]: Whether the op makes the payload of each input."""
        encoded = [False] * len(self._xs)
        for place, *_ in self._missing:
            encoded[place] = True
        return tuple(encoded)

    def take(self, codes, draw, offsets):
        """Take over the payloads that the op has made.

        Args:
            codes (Sequence[Tensor]): Second result of the op.
            draw (Draw): Seed, and offset of the first payload.
            offsets (Sequence[int]): Offset of each input from that.
        """
        begin = 0
        for place, quantizer, input, x, encoding in self._missing:
            end, bits = begin + encoding.num_tensors, encoding.bits
            if encoding.kind is ops.PayloadKind.ROWS:
                bits /= x.shape[0]
            drawn = ops.DrawnBits.of(
                quantizer.rounding, draw.seed, draw.offset + offsets[place]
            )
            format = PayloadFormat.of(
                x, bits, encoding.group_size, drawn=drawn
            )
            payload = QuantizedTensor(format, *codes[begin:end])
            self.payloads[place] = quantizer.publish(input, x, payload)
            begin = end

    def probe(self):
        """SensitivityProbe, optional: Probe of the first input."""
        return self._first.probe_linear(self.payloads[0], self._is_first)

    def to_save(self, layouts):
        """Tensors and formats of the payloads, for the backward pass.

        Args:
            layouts (Tensor[*]): Layouts that the op has returned. Strides of
                inputs are overwritten with those of their payloads.

        Returns:
            tuple[list[Tensor | None], list[int], list[int]]: Tensors, formats
            and random bits, as :func:`mmactnn.ops.conv_chain_backward` takes
            them.
        """
        codes, formats, draws, place = [], [], [], 0
        for payload, x in zip(self.payloads, self._xs):
            strides, place = place + 1 + x.dim(), place + 1 + 2 * x.dim()
            if payload is None:
                formats += ops.NOT_ENCODED
                draws += ops.NOT_DRAWN
                continue
            operands, format = payload.operands, payload.format
            if format.stride != x.stride():
                layouts[strides:place] = torch.tensor(format.stride)
            kind = _KINDS[format.kind]
            if kind is ops.PayloadKind.PLAIN and len(operands) == 4:
                kind = ops.PayloadKind.ROWS
            codes += operands
            formats += kind, int(format.bits), format.group_size
            drawn = format.drawn
            draws += ops.NOT_DRAWN if drawn is None else drawn.numbers
        return codes, formats, draws


def _first_layer_bits(quantizers):
    """Adaptive bits of any of the layers; None if bits are fixed."""
    found = (q and q.layer_bits for q in quantizers)
    return next((bits for bits in found if bits is not None), None)


def _output_payload(spec, output, kept, parameters, drawn):
    tensors = kept[spec.place : spec.place + 2]
    if spec.kind == 'split':
        first = spec.layer * ops.PARAMETERS
        tensors += parameters[first + 2 : first + ops.PARAMETERS]
    drawn = drawn[spec.step]
    if drawn and spec.follows_sum:
        drawn = drawn.second()
    format = PayloadFormat.of(
        output, spec.bits, spec.group_size, spec.kind, drawn
    )
    return format.make(*tensors)


def _cast(parameters, dtype):
    """Parameters of convolutions in a dtype, the others in float32."""
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
    """Run a chain of convolutions, normalisations and ReLUs.

    Outputs and gradients equal those of the layers, called one by one. Only
    the gradients of the outputs live longer: until the backward pass of the
    whole chain has ended.

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
        tuple[Tensor[N, O, *]]: The outputs of the steps that no others read.
    """
    call = _Call(chain, dtype, buffers, [])
    outputs = _Chain.apply(call, *inputs, *parameters)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    cache = next(q for q in chain.input_quantizers if q is not None).cache
    for output, payload in zip(outputs, call.payloads):
        if payload is not None:
            cache.put(output, payload)
    return outputs
