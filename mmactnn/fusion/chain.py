"""Layers of a block that run as one node of the graph where they can."""

from typing import NamedTuple

from torch import nn

from ..autograd import Link, chain
from ..autograd.autocast import lower_dtype
from ..layers import QConv1d, QConv2d, QConv3d
from ..ops.quantize import VALID_DTYPES
from ..units import MIB
from .members import may_be_passed_over, may_join
from .watched import are_all_watched, is_watched

_CONVS = (QConv1d, QConv2d, QConv3d)

# Up to this size of the input. A chain saves time on the host, which GPUs
# wait for at tensors smaller than this, and costs memory: the gradient of its
# output lives until the backward pass is through.
_MAX_BYTES = 128 * MIB


class Layers(NamedTuple):
    """Layers that follow one another.

    Attributes:
        conv (nn.Module): A convolution ...
        norm (nn.Module, optional): ... the normalisation of its output ...
        relu (nn.Module, optional): ... and the ReLU of that. One of the two
            there must be.
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
    if (
        not 0 < input.nbytes <= _MAX_BYTES
        or dtype not in VALID_DTYPES
        or are_all_watched()
    ):
        return None
    size, needed = input.shape, input.requires_grad
    for conv, norm, relu in layers:
        if not _takes_conv(conv, size):
            return None
        if lowered is None and conv._parameters['weight'].dtype != dtype:
            return None
        needed = needed or _needs_gradient(conv)
        size = _output_size(conv, size)
        if not needed or not (relu is None or may_be_passed_over(relu)):
            return None
        if norm is None:
            fits = relu.training and not relu.quantizer.exact
        else:
            fits = _takes_norm(norm, size)
        if not fits:
            return None
    if residual is not None and (
        residual.shape != size
        or residual.dtype != dtype
        or residual.device != input.device
    ):
        return None
    links = [_link(*group) for group in layers]
    return chain(input, residual, lowered, links)


def _takes_conv(conv, size):
    """Whether all that a convolution does to an input is to convolve it."""
    return (
        type(conv) in _CONVS
        and conv.training
        and not conv.quantizer.exact
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
        and len(size) == len(conv.kernel_size) + 2
        and not is_watched(conv)
    )


def _takes_norm(norm, size):
    """Whether a normalisation of some input can be fused."""
    return (
        may_join(norm)
        and norm.quantizer.fused_bits is not None
        and norm.takes_size(size)
    )


def _needs_gradient(layer):
    return any(
        p is not None and p.requires_grad for p in layer._parameters.values()
    )


def _output_size(conv, size):
    """Shape of what a convolution makes of an input of some shape."""
    places = zip(
        size[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation
    )
    return (
        size[0],
        conv.out_channels,
        *(
            (length + 2 * pad - step * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, pad, step in places
        ),
    )


def _link(conv, norm, relu):
    parameters = conv._parameters
    of_conv = parameters['weight'], parameters['bias']
    if norm is None:
        return Link(
            (*of_conv, None, None),
            conv.geometry,
            conv.quantizer,
            None,
            None,
            None,
            True,
            relu.quantizer,
        )
    parameters = norm._parameters
    return Link(
        (*of_conv, parameters['weight'], parameters['bias']),
        conv.geometry,
        conv.quantizer,
        norm.quantizer,
        norm.next_settings(),
        norm.stats_group(),
        relu is not None,
        None,
    )
