"""Layers of a block that run as one node of the graph where they can."""

import functools
import math
from typing import NamedTuple

from torch import nn

from ..autograd import Chain, chain
from ..autograd.autocast import lower_dtype
from ..capture import is_capturing
from ..layers import QConv1d, QConv2d, QConv3d
from ..ops import Follows, plan_link
from ..ops.quantize import VALID_DTYPES
from ..units import MIB
from .members import may_be_passed_over, may_join
from .watched import are_all_watched, is_watched

_CONVS = (QConv1d, QConv2d, QConv3d)

# Up to this size of an input. A chain saves time on the host, which GPUs
# wait for at tensors smaller than this, and costs memory: the gradient of its
# output lives until the backward pass is through, and a convolution's two
# gradients are computed in one call.
_MAX_BYTES = 192 * MIB


class Layers(NamedTuple):
    """Layers that follow one another.

    Attributes:
        conv (nn.Module): A convolution ...
        norm (nn.Module, optional): ... the normalisation of its output ...
        relu (nn.Module, optional): ... and the ReLU of that. Only the last of
            several may have none.
    """

    conv: nn.Module
    norm: nn.Module | None
    relu: nn.Module | None


def run_chain(layers, input, residual=None):
    """Run layers as one, if nobody can tell.

    Args:
        layers (Sequence[Layers]): The layers.
        input (Tensor[N, C, *]): Input of the first.
        residual (Tensor[N, O, *], optional): Added to the last normalisation,
            before its ReLU.

    Returns:
        Tensor[N, O, *], optional: Their output; None if they have to run one
        by one, and nothing has happened yet.
    """
    lowered = lower_dtype(input)
    dtype = lowered or input.dtype
    if dtype not in VALID_DTYPES or are_all_watched() or is_capturing():
        return None
    size, generator = input.shape, None
    for conv, norm, relu in layers:
        if not _takes_conv(conv, size, input, lowered):
            return None
        generator = generator or conv.quantizer.generator
        if conv.quantizer.generator is not generator:
            return None
        size = _output_size(
            size,
            conv.out_channels,
            tuple(conv.kernel_size),
            tuple(conv.stride),
            tuple(conv.padding),
            tuple(conv.dilation),
        )
        if min(size) <= 0:
            return None
        if relu is not None and not may_be_passed_over(relu):
            return None
        if norm is not None:
            fits = _takes_norm(norm, size)
        else:
            fits = relu is None or (relu.is_coded and relu.training)
        if not fits:
            return None
    if residual is not None and (
        residual.shape != size
        or residual.dtype != dtype
        or residual.device != input.device
    ):
        return None
    return chain(input, residual, lowered, _plan(layers, residual))


def _takes_conv(conv, size, first, lowered):
    """Whether a convolution of some input is one that a chain computes.

    Args:
        conv (nn.Module): What is in its place.
        size (Sequence[int]): Shape of its input.
        first (Tensor[N, C, *]): Input of the chain.
        lowered (torch.dtype, optional): Autocast's.

    Returns:
        bool: False also where torch's layer would refuse the input.
    """
    if type(conv) not in _CONVS or is_watched(conv) or not conv.training:
        return False
    quantizer = conv.quantizer
    if quantizer.exact or quantizer.meter is not None:
        return False
    weight, dtype = conv._parameters['weight'], lowered or first.dtype
    nbytes = math.prod(size) * dtype.itemsize
    limit = quantizer.chunk_bytes
    return (
        weight is not None
        and weight.requires_grad
        and weight.device == first.device
        and (lowered is not None or weight.dtype == dtype)
        and 0 < nbytes <= _MAX_BYTES
        and (limit is None or nbytes <= limit)
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
        and len(size) == len(conv.kernel_size) + 2
        and size[1] == conv.in_channels
    )


def _takes_norm(norm, size):
    """Whether a normalisation of some input can be fused here."""
    return (
        may_join(norm)
        and norm.quantizer.fused_bits is not None
        and norm.takes_size(size)
        and norm.stats_group() is None
    )


@functools.lru_cache
def _output_size(size, channels, kernel_size, stride, padding, dilation):
    """Shape of what a convolution makes of an input of some shape."""
    places = zip(size[2:], kernel_size, stride, padding, dilation)
    return (
        size[0],
        channels,
        *[
            (length + 2 * pad - step * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, pad, step in places
        ],
    )


def _plan(layers, residual):
    """The layers as the ops take them; counts the batch where norms do."""
    parameters, buffers, plan, settings = [], [], [], []
    output = None
    for conv, norm, relu in layers:
        of_conv = conv._parameters
        parameters += of_conv['weight'], of_conv['bias']
        if norm is None:
            parameters += None, None
            buffers += None, None, None
            settings += 0.0, 0.0
            of_batch, act_bits = False, 0
            if relu is None:
                # A group size that is valid, and not looked at.
                follows, bits = Follows.NOTHING, 0
                group_size = conv.quantizer.group_size
            else:
                follows, bits = Follows.RELU, relu.quantizer.bits
                group_size = relu.quantizer.group_size
                output = 'zeroed', bits, group_size
        else:
            of_norm, quantizer = norm._parameters, norm.quantizer
            parameters += of_norm['weight'], of_norm['bias']
            *stats, of_batch, momentum, eps = norm.next_settings()
            buffers += stats
            settings += momentum, eps
            fused, group_size = quantizer.fused_bits, quantizer.group_size
            adds = residual is not None and norm is layers[-1].norm
            act_bits = fused.zeroed if adds else 0
            if relu is None:
                follows, bits = Follows.NORM, fused.plain
            elif adds:
                follows, bits = Follows.NORM_RELU, fused.plain
                output = 'zeroed', act_bits, group_size
            else:
                follows, bits = Follows.NORM_RELU, fused.split
                output = 'split', bits, group_size
        plan += plan_link(
            tuple(conv.stride),
            tuple(conv.padding),
            tuple(conv.dilation),
            conv.groups,
            follows,
            of_batch,
            (bits, act_bits, group_size),
        )
    last = layers[-1]
    if last.relu is None:
        output = None
    rounded = len(layers) - (last.norm is None and last.relu is None)
    quantizer = layers[0].conv.quantizer
    return Chain(
        parameters, buffers, plan, settings, rounded, quantizer, output
    )
