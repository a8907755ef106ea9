"""Layers of a block that run as one node of the graph where they can."""

from operator import itemgetter
from typing import NamedTuple

import torch
from torch import nn

from ..autograd import run_chain
from ..autograd.autocast import lower_dtype
from ..codes.units import MIB
from ..layers import QReLU
from ..modules.execution import is_ordinary
from ..ops import PARAMETERS
from ..ops.capture import is_capturing
from ..ops.quantize import VALID_DTYPES
from .chain_plan import plan_chain
from .eligibility import CHAINED_CONVS, NORMS

# Limit for the input of a convolution, for the sum of the inputs that a chain
# keeps, and for the sum of several outputs. A chain saves time on the host,
# which GPUs wait for at tensors smaller than this, and costs memory: the
# gradients of its outputs live until the backward pass has ended.
_MAX_BYTES = 128 * MIB

# State of a layer and its settings on which an execution plan depends. It is
# read at every call, hence with as few operations as possible.
_HOOKS = itemgetter(
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)
_CONV_STATE = itemgetter(
    'training',
    'stride',
    'padding',
    'dilation',
    'groups',
    'kernel_size',
    'padding_mode',
    'in_channels',
    'out_channels',
    'quantizer',
)
_NORM_STATE = itemgetter(
    'training', 'momentum', 'eps', 'track_running_stats', 'quantizer'
)
_RELU_STATE = itemgetter('training', 'quantizer')
_QUANTIZER_STATE = itemgetter(
    'bits',
    'group_size',
    'generator',
    'layer_bits',
    'chunk_bytes',
    'strict',
    'fused_bits',
    'rounding',
    'meter',
)


def fit_in_chain(values):
    """Whether values are tensors small enough to be inputs of a chain.

    Args:
        values (Sequence[object]): The values.
    """
    for value in values:
        if not isinstance(value, torch.Tensor) or value.nbytes > _MAX_BYTES:
            return False
    return True


def count_oversized(inputs):
    """Number of leading feature maps that are too large for one chain.

    Args:
        inputs (Sequence[Tensor[N, C, *]]): The maps, the largest first.

    Returns:
        int: Number of maps to leave out so that the others fit together; all
        of them if even the last one is too large.
    """
    total = sum(x.nbytes for x in inputs)
    for i, x in enumerate(inputs):
        if total <= _MAX_BYTES:
            return i
        total -= x.nbytes
    return len(inputs)


class ChainLayer(NamedTuple):
    """Layer of a chain: a convolution with its normalisation and ReLU.

    Attributes:
        conv (nn.Module, optional): The convolution; None, which no chain
            supports, if the block has lost it.
        norm (nn.Module, optional): Normalisation of its output.
        relu (nn.Module, optional): ReLU of that. A layer without one must not
            be read by other layers.
        source (int): Value that it reads: the output of an earlier layer, by
            its index, or an input (:func:`mmactnn.ops.source_of_input`).
        residual (int, optional): Value that is added before the ReLU,
            likewise.
    """

    conv: nn.Module
    norm: nn.Module | None
    relu: nn.Module | None
    source: int
    residual: int | None = None


class ChainRunner:
    """Runs layers as one node of the graph.

    The execution plan is cached until the state of a layer changes. Copies
    and pickles start without one.

    Args:
        for_each (bool, optional): Whether the layers, which read one input,
            run for each of the inputs of a call. Defaults to False.

    Attributes:
        too_large (bool): Whether the last call has run nothing for the sizes
            of tensors alone.
    """

    def __init__(self, for_each=False):
        self.too_large = False
        self._for_each = for_each
        self._state = None
        self._plan = None

    def __reduce__(self):
        return type(self), (self._for_each,)

    def __call__(self, layers, inputs):
        """Run the layers, where :func:`.eligibility.may_fuse` holds.

        Args:
            layers (Sequence[ChainLayer]): The layers.
            inputs (Sequence[Tensor[N, C, *]]): Their inputs.

        Returns:
            tuple[Tensor[N, O, *]], optional: Outputs of the layers that no
            others read, input by input; None if the layers have to run one
            by one, and nothing has happened yet.
        """
        self.too_large = False
        first = inputs[0]
        lowered = lower_dtype(first)
        dtype = lowered or first.dtype
        if (
            dtype not in VALID_DTYPES
            or not all(map(is_ordinary, inputs))
            or is_capturing()
        ):
            return None
        found = _read_state(layers)
        if found is None:
            return None
        state, parameters, buffers = found
        state.append(len(inputs))
        if state != self._state:
            repeats = len(inputs) if self._for_each else 1
            self._plan = plan_chain(layers, repeats)
            self._state = state
        plan = self._plan
        if (
            plan is None
            or not _are_weights_valid(parameters, first, lowered)
            or not plan.accepts(inputs, dtype)
        ):
            return None
        self.too_large = not plan.accepts_sizes(inputs, dtype, _MAX_BYTES)
        if self.too_large:
            return None
        return run_chain(plan.chain, inputs, parameters, buffers, lowered)


def _read_state(layers):
    """State, parameters and buffers of layers.

    Returns:
        tuple[list, list[Tensor | None], list[Tensor | None]], optional: All
        that :func:`plan_chain` depends on, equal to that of another call if
        nothing has changed; parameters and buffers, see
        :func:`mmactnn.autograd.run_chain`. None if a layer has a class
        that a chain does not support, hooks, a patched forward pass, or
        statistics of several processes.
    """
    state, parameters, buffers = [], [], []
    for conv, norm, relu, *sources in layers:
        if type(conv) not in CHAINED_CONVS:
            return None
        own = conv.__dict__
        conv_parameters = own['_parameters']
        if (
            any(_HOOKS(own))
            or 'forward' in own
            or '_conv_forward' in own
            or 'weight' not in conv_parameters
        ):
            return None
        parameters += conv_parameters['weight'], conv_parameters['bias']
        state += conv, sources, _CONV_STATE(own)
        state.append(_QUANTIZER_STATE(own['quantizer'].__dict__))
        if norm is None:
            parameters += None, None
            buffers += None, None, None
        else:
            own = norm.__dict__
            if (
                type(norm) not in NORMS
                or any(_HOOKS(own))
                or 'forward' in own
                or norm.stats_group() is not None
            ):
                return None
            norm_parameters, stats = own['_parameters'], own['_buffers']
            parameters += norm_parameters['weight'], norm_parameters['bias']
            buffers += norm.next_buffers()
            state += norm, _NORM_STATE(own), stats['running_mean'] is None
            state.append(_QUANTIZER_STATE(own['quantizer'].__dict__))
        if relu is not None:
            own = relu.__dict__
            if type(relu) is not QReLU or any(_HOOKS(own)) or 'forward' in own:
                return None
            quantizer = own['quantizer']
            state += relu, _RELU_STATE(own), quantizer.bits
            state.append(quantizer.rounding)
    state += [None if p is None else p.dtype for p in parameters]
    return state, parameters, buffers


def _are_weights_valid(parameters, first, lowered):
    """Whether all convolutions are trained and accept an input.

    Torch's layers refuse weights of another device or dtype.
    """
    device, dtype = first.device, first.dtype
    for weight in parameters[::PARAMETERS]:
        if (
            not weight.requires_grad
            or weight.device != device
            or (lowered is None and weight.dtype != dtype)
        ):
            return False
    return True
