"""What a chain makes of layers, as long as these do not change."""

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


class Prepared:
    """What is to be run of layers in some state.

    Args:
        layers (Sequence[Layers]): The layers.
        chain (Chain): What the op is to do.
        repeats (int): For how many inputs the layers run.
    """

    def __init__(self, layers, chain, repeats):
        self.chain = chain
        self._repeats = repeats
        self._slots = [
            reader.layer_bits
            for reader in chain.readers
            if reader is not None and reader.layer_bits is not None
        ]
        self._added = [
            ~layer.added
            for layer in layers
            if layer.added is not None and is_input(layer.added)
        ]
        # Shapes vary from batch to batch.
        self._sizes = functools.lru_cache(maxsize=256)(
            functools.partial(_sizes, tuple(map(tuple, layers)))
        )

    def takes(self, inputs, dtype):
        """Whether the layers can run on tensors, if their sizes allow.

        Args:
            inputs (Sequence[Tensor[N, C, *]]): The tensors.
            dtype (torch.dtype): What they are about to be cast to.
        """
        for slot in self._slots:
            slot.begin_call()
        first = inputs[0]
        for x in inputs[1:]:
            if x.device != first.device or (
                x.dtype != first.dtype and x.dtype != dtype
            ):
                return False
        # A sum of two dtypes would be of the larger one.
        if any(inputs[n].dtype != dtype for n in self._added):
            return False
        # Reports are of one layer and one input.
        return self.chain.observed or not any(
            slot.observes for slot in self._slots
        )

    def fits(self, inputs, dtype, max_bytes):
        """Whether the layers can run on tensors of these sizes.

        Args:
            inputs (Sequence[Tensor[N, C, *]]): The tensors.
            dtype (torch.dtype): What they are about to be cast to.
            max_bytes (int): Most bytes of the input of a convolution, of all
                inputs that are kept, and of all outputs where there are
                several.
        """
        shapes = tuple([x.shape for x in inputs])
        calls = [shapes] if self._repeats == 1 else zip(shapes)
        kept = made = 0
        for own in calls:
            sizes = self._sizes(own, dtype.itemsize, max_bytes)
            if sizes is None:
                return False
            kept += sizes[0]
            made += sizes[1]
        several = len(self.chain.output_payloads) > 1
        return kept <= max_bytes and not (several and made > max_bytes)


def _sizes(layers, shapes, itemsize, max_bytes):
    """Bytes of what layers keep of inputs of some shapes, and return.

    Returns:
        tuple[int, int], optional: None if one of the layers would refuse its
        input, or that is too large.
    """
    outputs, read = [], set()
    for conv, norm, _, source, added in layers:
        shape = shapes[~source] if is_input(source) else outputs[source]
        nbytes, limit = math.prod(shape) * itemsize, conv.quantizer.chunk_bytes
        if (
            len(shape) != len(conv.kernel_size) + 2
            or shape[1] != conv.in_channels
            or not 0 < nbytes <= max_bytes
            or (limit is not None and nbytes > limit)
        ):
            return None
        places = zip(
            shape[2:],
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        shape = (
            shape[0],
            conv.out_channels,
            *[
                (length + 2 * pad - step * (kernel - 1) - 1) // stride + 1
                for length, kernel, stride, pad, step in places
            ],
        )
        if min(shape) <= 0 or (
            norm is not None and not norm.takes_size(shape)
        ):
            return None
        if added is not None and shape != (
            shapes[~added] if is_input(added) else outputs[added]
        ):
            return None
        read.update((source, added))
        outputs.append(shape)
    kept = [
        shapes[~source]
        for source in {layer[3] for layer in layers}
        if is_input(source)
    ]
    ends = [shape for i, shape in enumerate(outputs) if i not in read]
    return tuple(sum(map(math.prod, part)) * itemsize for part in (kept, ends))


def prepare(layers, repeats):
    """What a chain makes of layers.

    Args:
        layers (Sequence[Layers]): The layers, of the classes that a chain
            takes.
        repeats (int): For how many inputs they run.

    Returns:
        Prepared, optional: None if a chain cannot run them.
    """
    followers = [_follower(*layer[1:3], layer.added) for layer in layers]
    generator = layers[0].conv.quantizer.generator
    convs = [layer.conv for layer in layers]
    if None in followers or not all(
        _takes_conv(conv) and conv.quantizer.generator is generator
        for conv in convs
    ):
        return None
    links = [
        ChainStep(
            *[_repeat(s, n, len(layers)) for s in (layer.source, layer.added)],
            i,
            layer.conv.stride,
            layer.conv.padding,
            layer.conv.dilation,
            layer.conv.groups,
            *followers[i],
        )
        for n in range(repeats)
        for i, layer in enumerate(layers)
    ]
    readers = _find_readers(links, convs)
    ends = _find_ends(links)
    if readers is None or ends is None:
        return None
    norms = [norm for _, norm, *_ in layers]
    settings = [
        0.0 if norm is None or setting is None else setting
        for norm in norms
        for setting in (norm and norm.momentum, norm and norm.eps)
    ]
    casts = any(
        parameter is not None and parameter.dtype is not torch.float32
        for norm in norms
        if norm is not None
        for parameter in (norm.weight, norm.bias)
    )
    observed = [i for i, link in enumerate(links) if is_input(link.source)]
    chain = Chain(
        ChainPlan.of(links, settings),
        readers,
        ends,
        casts,
        generator,
        observed == [0],
    )
    return Prepared(layers, chain, repeats)


def _repeat(source, n, layers):
    """What layers read or add that run for the n-th input."""
    if source is None:
        return None
    if is_input(source):
        return source_of_input(n + ~source)
    return source + n * layers


def _find_readers(links, convs):
    """Settings of the convolutions that keep the inputs, see ``Chain``.

    None if codes that do for one of them do not for another.
    """
    readers = {}
    for link in links:
        if link.added is not None and is_input(link.added):
            readers.setdefault(~link.added, None)
        if not is_input(link.source):
            continue
        quantizer = convs[link.layer].quantizer
        if readers.get(~link.source) is None:
            readers[~link.source] = quantizer
        elif quantizer.strict:
            return None
    return [readers[n] for n in range(len(readers))]


def _find_ends(links):
    """Payloads of the outputs that no other link reads, see ``Chain``.

    None if one that another link reads has none.
    """
    read = {link.source for link in links} | {link.added for link in links}
    ends, place = [], 0
    for i, link in enumerate(links):
        end = None
        if link.added is not None:
            end = 'zeroed', link.act_bits, link.group_size, place + 3
        elif link.epilogue is Epilogue.RELU:
            end = 'zeroed', link.bits, link.group_size, place
        elif link.epilogue is Epilogue.NORM_RELU:
            end = 'split', link.bits, link.group_size, place + 1
        if i not in read:
            ends.append(end and OutputPayload(*end, link.layer))
        place += link.num_saved
    if any(
        not is_input(link.source)
        and links[link.source].epilogue
        not in (Epilogue.RELU, Epilogue.NORM_RELU)
        for link in links
    ):
        return None
    return ends


def _takes_conv(conv):
    """Whether a chain computes what a convolution does."""
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


def _follower(norm, relu, added):
    """What follows a convolution: the fields of a step from ``epilogue`` on.

    None if a chain does not compute it.
    """
    if norm is None:
        # A group size that is valid, and not looked at.
        bits, group_size = 0, GROUP_SIZES[0]
        if relu is not None:
            bits, group_size = relu.quantizer.bits, relu.quantizer.group_size
            if not (relu.is_coded and relu.training):
                return None
        follows = Epilogue.NONE if relu is None else Epilogue.RELU
        return follows, False, bits, 0, group_size
    fused, group_size = norm.quantizer.fused_bits, norm.quantizer.group_size
    # Without momentum the host counts the batches.
    counts = norm.training and norm.track_running_stats
    if fused is None or (counts and norm.momentum is None):
        return None
    follows, bits = Epilogue.NORM, fused.plain
    if relu is not None:
        follows = Epilogue.NORM_RELU
        bits = fused.split if added is None else fused.plain
    act_bits = 0 if added is None else fused.zeroed
    return follows, norm.uses_batch_stats(), bits, act_bits, group_size
