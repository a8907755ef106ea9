"""Execution plan of a chain, cached until the state of a layer changes."""

import functools
import math

import torch

from ..autograd import Chain, OutputPayload
from ..ops import (
    GROUP_SIZES,
    ChainPlan,
    ChainStep,
    Epilogue,
    is_input,
    source_of_input,
)


class ExecutionPlan:
    """Execution plan of a chain of layers in a given state.

    Args:
        layers (Sequence[ChainLayer]): The layers.
        chain (Chain): Arguments of the op.
        repeats (int): Number of inputs for which the layers run.
    """

    def __init__(self, layers, chain, repeats):
        self.chain = chain
        self._repeats = repeats
        self._layer_bits = [
            quantizer.layer_bits
            for quantizer in chain.input_quantizers
            if quantizer is not None and quantizer.layer_bits is not None
        ]
        self._residual_inputs = [
            ~layer.residual
            for layer in layers
            if layer.residual is not None and is_input(layer.residual)
        ]
        # Shapes vary from batch to batch.
        self._sizes = functools.lru_cache(maxsize=256)(
            functools.partial(_infer_sizes, tuple(map(tuple, layers)))
        )

    def accepts(self, inputs, dtype):
        """Whether the layers can run on tensors, apart from their sizes.

        Args:
            inputs (Sequence[Tensor[N, C, *]]): The tensors.
            dtype (torch.dtype): Dtype to which they will be cast.
        """
        for layer_bits in self._layer_bits:
            layer_bits.begin_call()
        first = inputs[0]
        for x in inputs[1:]:
            if x.device != first.device or (
                x.dtype != first.dtype and x.dtype != dtype
            ):
                return False
        # A sum of two dtypes would be of the larger one.
        if any(inputs[n].dtype != dtype for n in self._residual_inputs):
            return False
        # A report covers one layer and one input.
        return self.chain.observed or not any(
            layer_bits.observes for layer_bits in self._layer_bits
        )

    def accepts_sizes(self, inputs, dtype, max_bytes):
        """Whether the layers can run on tensors of these sizes.

        Args:
            inputs (Sequence[Tensor[N, C, *]]): The tensors.
            dtype (torch.dtype): Dtype to which they will be cast.
            max_bytes (int): Limit in bytes for the input of a convolution,
                for the sum of the inputs that are kept, and for the sum of
                the outputs where there are several.
        """
        shapes = tuple([x.shape for x in inputs])
        calls = [shapes] if self._repeats == 1 else zip(shapes)
        kept = returned = 0
        for call in calls:
            sizes = self._sizes(call, dtype.itemsize, max_bytes)
            if sizes is None:
                return False
            kept += sizes[0]
            returned += sizes[1]
        several = len(self.chain.output_payloads) > 1
        return kept <= max_bytes and not (several and returned > max_bytes)


def _infer_sizes(layers, shapes, itemsize, max_bytes):
    """Bytes of the inputs that layers keep, and of their outputs.

    Args:
        layers (tuple[tuple]): Fields of each ``ChainLayer``.
        shapes (Sequence[torch.Size]): Shapes of the inputs.
        itemsize (int): Bytes an element.
        max_bytes (int): Limit in bytes for the input of a convolution.

    Returns:
        tuple[int, int], optional: None if one of the layers would refuse its
        input, or if that exceeds the limit.
    """
    outputs, read = [], set()

    def shape_of(source):
        return shapes[~source] if is_input(source) else outputs[source]

    for conv, norm, _, source, residual in layers:
        shape = shape_of(source)
        nbytes, limit = math.prod(shape) * itemsize, conv.quantizer.chunk_bytes
        if (
            len(shape) != len(conv.kernel_size) + 2
            or shape[1] != conv.in_channels
            or not 0 < nbytes <= max_bytes
            or (limit is not None and nbytes > limit)
        ):
            return None
        shape = _output_shape(conv, shape)
        if (
            min(shape) <= 0
            or (norm is not None and not norm.takes_size(shape))
            or (residual is not None and shape != shape_of(residual))
        ):
            return None
        read.update((source, residual))
        outputs.append(shape)
    kept = [
        shape_of(source)
        for source in {layer[3] for layer in layers}
        if is_input(source)
    ]
    returned = [shape for i, shape in enumerate(outputs) if i not in read]
    return tuple(
        sum(map(math.prod, part)) * itemsize for part in (kept, returned)
    )


def _output_shape(conv, shape):
    spatial = zip(
        shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation
    )
    return (
        shape[0],
        conv.out_channels,
        *[
            (length + 2 * pad - step * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, pad, step in spatial
        ],
    )


def plan_chain(layers, repeats):
    """Make the execution plan of a chain.

    Args:
        layers (Sequence[ChainLayer]): The layers, of classes that a chain
            supports.
        repeats (int): Number of inputs for which they run.

    Returns:
        ExecutionPlan, optional: None if a chain cannot run the layers.
    """
    epilogues = [
        _plan_epilogue(layer.norm, layer.relu, layer.residual is not None)
        for layer in layers
    ]
    generator = layers[0].conv.quantizer.generator
    convs = [layer.conv for layer in layers]
    # The op encodes all or none with rotated codes.
    rotated = {
        module.quantizer.rounding == 'rotated'
        for layer in layers
        for module in (layer.conv, layer.norm, layer.relu)
        if module is not None
    }
    if (
        len(rotated) > 1
        or None in epilogues
        or not all(
            _supports_conv(conv) and conv.quantizer.generator is generator
            for conv in convs
        )
    ):
        return None
    steps = [
        ChainStep(
            _shift_source(layer.source, n, len(layers)),
            _shift_source(layer.residual, n, len(layers)),
            i,
            layer.conv.stride,
            layer.conv.padding,
            layer.conv.dilation,
            layer.conv.groups,
            *epilogues[i],
        )
        for n in range(repeats)
        for i, layer in enumerate(layers)
    ]
    input_quantizers = _find_input_quantizers(steps, convs)
    output_payloads = _find_output_payloads(steps)
    if input_quantizers is None or output_payloads is None:
        return None
    norms = [layer.norm for layer in layers]
    settings = [
        0.0 if norm is None or setting is None else setting
        for norm in norms
        for setting in (norm and norm.momentum, norm and norm.eps)
    ]
    observed = [i for i, step in enumerate(steps) if is_input(step.source)]
    chain = Chain(
        ChainPlan.of(steps, settings),
        steps,
        input_quantizers,
        output_payloads,
        any(map(_needs_cast, norms)),
        generator,
        rotated.pop(),
        observed == [0],
        {},
    )
    return ExecutionPlan(layers, chain, repeats)


def _needs_cast(norm):
    """Whether a normalisation has parameters that are not float32."""
    return norm is not None and any(
        parameter is not None and parameter.dtype is not torch.float32
        for parameter in (norm.weight, norm.bias)
    )


def _shift_source(source, n, num_layers):
    """Source of the n-th repetition for a source of the first one."""
    if source is None:
        return None
    if is_input(source):
        return source_of_input(n + ~source)
    return source + n * num_layers


def _find_input_quantizers(steps, convs):
    """Quantizers of the inputs, see ``Chain.input_quantizers``.

    None if convolutions that read one input need different codes of it.
    """
    quantizers = {}
    for step in steps:
        if step.residual is not None and is_input(step.residual):
            quantizers.setdefault(~step.residual, None)
        if not is_input(step.source):
            continue
        quantizer = convs[step.layer].quantizer
        if quantizers.get(~step.source) is None:
            quantizers[~step.source] = quantizer
        elif quantizer.strict:
            return None
    return [quantizers[n] for n in range(len(quantizers))]


def _find_output_payloads(steps):
    """Payloads of the chain's outputs, see ``Chain.output_payloads``.

    None if a step reads the output of a step without a payload.
    """
    read = {s for step in steps for s in (step.source, step.residual)}
    payloads, place = [], 0
    for i, step in enumerate(steps):
        format = None
        if step.residual is not None:
            format = 'zeroed', step.act_bits, step.group_size, place + 3
        elif step.epilogue is Epilogue.RELU:
            format = 'zeroed', step.bits, step.group_size, place
        elif step.epilogue is Epilogue.NORM_RELU:
            format = 'split', step.bits, step.group_size, place + 1
        if i not in read:
            adds = step.residual is not None
            payloads.append(
                format and OutputPayload(*format, step.layer, i, adds)
            )
        place += step.num_saved
    if any(
        not is_input(step.source)
        and steps[step.source].epilogue
        not in (Epilogue.RELU, Epilogue.NORM_RELU)
        for step in steps
    ):
        return None
    return payloads


def _supports_conv(conv):
    """Whether a chain supports the settings of a convolution."""
    quantizer, bias = conv.quantizer, conv.bias
    return (
        conv.training
        and not quantizer.exact
        and quantizer.meter is None
        and conv.weight is not None
        and (bias is None or bias.dtype is conv.weight.dtype)
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
    )


def _plan_epilogue(norm, relu, has_residual):
    """Fields of a ``ChainStep`` from ``epilogue`` on.

    None if a chain does not support the layers.
    """
    if norm is None:
        if relu is None:
            # Any valid group size; the op ignores it.
            return Epilogue.NONE, False, 0, 0, GROUP_SIZES[0]
        if not (relu.is_coded and relu.training):
            return None
        own = relu.quantizer
        format = own.bits, 0, own.group_size, own.rounding
        return Epilogue.RELU, False, *format
    fused, group_size = norm.quantizer.fused_bits, norm.quantizer.group_size
    # Without momentum the host counts the batches.
    counts = norm.training and norm.track_running_stats
    if fused is None or (counts and norm.momentum is None):
        return None
    epilogue, bits = Epilogue.NORM, fused.plain
    if relu is not None:
        epilogue = Epilogue.NORM_RELU
        bits = fused.plain if has_residual else fused.split
    act_bits = fused.zeroed if has_residual else 0
    return (
        epilogue,
        norm.uses_batch_stats(),
        bits,
        act_bits,
        group_size,
        norm.quantizer.rounding,
    )
