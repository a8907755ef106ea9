"""Layers of a block that run as one node of the graph where they can."""

from operator import itemgetter
from typing import NamedTuple

from torch import nn

from ..autograd import run_chain
from ..autograd.autocast import lower_dtype
from ..codes.units import MIB
from ..layers import QReLU
from ..modules.execution import is_ordinary
from ..ops import PARAMETERS
from ..ops.capture import is_capturing
from ..ops.quantize import VALID_DTYPES
from .eligibility import CHAINED_CONVS, NORMS
from .prepared import prepare

# Up to this size of the input of a convolution. A chain saves time on the
# host, which GPUs wait for at tensors smaller than this, and costs memory: the
# gradients of its outputs live until the backward pass is through. All inputs
# that it keeps, and all of several outputs, are no larger either.
_MAX_BYTES = 128 * MIB

# What prepare() and the rest here depend on, of a layer and its settings. Read
# at every call, hence by what takes the least time.
_HOOKS = itemgetter(
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)
_OF_CONV = itemgetter(
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
_OF_NORM = itemgetter(
    'training', 'momentum', 'eps', 'track_running_stats', 'quantizer'
)
_OF_RELU = itemgetter('training', 'quantizer')
_OF_QUANTIZER = itemgetter(
    'bits',
    'group_size',
    'generator',
    'layer_bits',
    'chunk_bytes',
    'strict',
    'fused_bits',
    'meter',
)


def count_large(inputs):
    """How many feature maps are left out so that a chain takes the rest.

    Args:
        inputs (Sequence[Tensor[N, C, *]]): The maps, the largest first.

    Returns:
        int: The number of the first maps; all of them if even the last is
        too large.
    """
    total = sum(x.nbytes for x in inputs)
    for i, x in enumerate(inputs):
        if total <= _MAX_BYTES:
            return i
        total -= x.nbytes
    return len(inputs)


class Layers(NamedTuple):
    """A convolution and what follows it.

    Attributes:
        conv (nn.Module, optional): A convolution; None if there is none, and
            no chain ...
        norm (nn.Module, optional): ... the normalisation of its output ...
        relu (nn.Module, optional): ... and the ReLU of that. Only those that
            no other layers read may have none.
        source (int): What they read: the output of layers before them, by
            their index, or an input (:func:`mmactnn.ops.source_of_input`).
        added (int, optional): What is added before the ReLU, likewise.
    """

    conv: nn.Module
    norm: nn.Module | None
    relu: nn.Module | None
    source: int
    added: int | None = None


class ChainRunner:
    """Runs layers as one node of the graph, if nobody can tell.

    Keeps what it has made of the layers until something about them changes.
    Copies and pickles start anew.

    Args:
        for_each (bool, optional): Whether the layers, which read one input,
            run for each of the inputs that they get. Defaults to False.

    Attributes:
        too_large (bool): Whether the last call has run nothing for the sizes
            of tensors alone.
    """

    def __init__(self, for_each=False):
        self.too_large = False
        self._for_each = for_each
        self._state = None
        self._prepared = None

    def __reduce__(self):
        return type(self), (self._for_each,)

    def __call__(self, layers, inputs):
        """Run the layers, where :func:`.eligibility.may_fuse` holds.

        Args:
            layers (Sequence[Layers]): The layers.
            inputs (Sequence[Tensor[N, C, *]]): What they read.

        Returns:
            tuple[Tensor[N, O, *]], optional: The outputs of those that no
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
        seen = _look(layers)
        if seen is None:
            return None
        state, parameters, buffers = seen
        state.append(len(inputs))
        if state != self._state:
            repeats = len(inputs) if self._for_each else 1
            self._prepared = prepare(layers, repeats)
            self._state = state
        prepared = self._prepared
        if (
            prepared is None
            or not _go_together(parameters, first, lowered)
            or not prepared.takes(inputs, dtype)
        ):
            return None
        self.too_large = not prepared.fits(inputs, dtype, _MAX_BYTES)
        if self.too_large:
            return None
        return run_chain(prepared.chain, inputs, parameters, buffers, lowered)


def _look(layers):
    """See what the layers are now.

    Returns:
        tuple[list, list[Tensor | None], list[Tensor | None]], optional: All
        that :func:`prepare` depends on, equal to that of another call if
        nothing has changed; parameters and buffers, see
        :func:`mmactnn.autograd.run_chain`. None if one of the layers is none
        that a chain runs, or somebody sees what goes in or out of it.
    """
    state, parameters, buffers = [], [], []
    for conv, norm, relu, *sources in layers:
        if type(conv) not in CHAINED_CONVS:
            return None
        own = conv.__dict__
        of_conv = own['_parameters']
        if (
            any(_HOOKS(own))
            or 'forward' in own
            or '_conv_forward' in own
            or 'weight' not in of_conv
        ):
            return None
        parameters += of_conv['weight'], of_conv['bias']
        state += conv, sources, _OF_CONV(own)
        state.append(_OF_QUANTIZER(own['quantizer'].__dict__))
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
            of_norm, stats = own['_parameters'], own['_buffers']
            parameters += of_norm['weight'], of_norm['bias']
            buffers += norm.next_buffers()
            state += norm, _OF_NORM(own), stats['running_mean'] is None
            state.append(_OF_QUANTIZER(own['quantizer'].__dict__))
        if relu is not None:
            own = relu.__dict__
            if type(relu) is not QReLU or any(_HOOKS(own)) or 'forward' in own:
                return None
            state += relu, _OF_RELU(own), own['quantizer'].bits
    state += [None if p is None else p.dtype for p in parameters]
    return state, parameters, buffers


def _go_together(parameters, first, lowered):
    """Whether convolutions take an input, and are trained.

    Torch's layers refuse some that do not go together.
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
