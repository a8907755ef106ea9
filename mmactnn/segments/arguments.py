"""Arguments of a segment, kept as codes between its two forward passes."""

from typing import NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..codes.payload import PayloadFormat
from ..extension import has_kernels
from ..modules.execution import is_ordinary
from ..ops.quantize import VALID_DTYPES

# Smaller tensors stay exact: codes of them save nothing that matters.
MIN_CODED = 1024
# So do tensors that are smaller than the largest one by this factor, such as
# the reference points beside the features that are sampled at them.
MIN_FRACTION = 16


# Tokens of this size have ranges of their own: a normalisation brings small
# tokens, such as a class token at first, to the size of large ones, and with
# them the noise of a range that both would share.
MIN_TOKEN = 64


class _Exact(NamedTuple):
    """A tensor that is kept as it is.

    Attributes:
        index (int): Place among the kept tensors.
    """

    index: int


class _Coded(NamedTuple):
    """A tensor that is kept as a payload.

    Attributes:
        shape (torch.Size): Shape of the tensor.
        format (PayloadFormat): Format of the payload.
        start (int): First of its tensors among the kept ones.
        stop (int): One past the last one.
    """

    shape: torch.Size
    format: PayloadFormat
    start: int
    stop: int


class _Decode(torch.autograd.Function):
    """Makes a decoded tensor that has a node, as the original had.

    Without a node it would be a leaf, on which functions in place are errors.
    """

    @staticmethod
    def forward(ctx, anchor, payload, shape):
        values = payload.unpack()
        return values if values.shape == shape else values.view(shape)

    @staticmethod
    def backward(ctx, grad_output):
        # Recomputed nodes are never run, unless the segment computes
        # gradients itself; these stop at its inputs.
        return None, None, None


class EncodedArguments:
    """Arguments of one call, as tensors to keep and a recipe.

    Tensors that carry a gradient from an operation before (floating point,
    dense, not tiny) become codes; leaves such as parameters, integers,
    tensors that share memory with another argument and all else stay as
    they are.

    Args:
        args (tuple): Arguments, nested in any containers that
            ``torch.utils._pytree`` knows.
        kwargs (dict): Keyword arguments, likewise.
        quantizer (LayerQuantizer): Codec of the segment.

    Attributes:
        kept (tuple[Tensor | None]): Tensors to keep for :meth:`decode`.
        payloads (tuple[Tensor]): Those of ``kept`` that belong to payloads.
    """

    def __init__(self, args, kwargs, quantizer):
        leaves, self._spec = tree_flatten((args, kwargs))
        coded = _choose(leaves)
        kept, places, self._recipe = [], {}, []
        payloads = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                self._recipe.append(leaf)
                continue
            place = places.get(id(leaf))
            if place is None:
                if id(leaf) in coded:
                    payload = _payload_of(leaf, quantizer)
                    tensors = payload.tensors
                    stop = len(kept) + len(tensors)
                    place = _Coded(leaf.shape, payload.format, len(kept), stop)
                    kept += tensors
                    payloads += [t for t in tensors if t is not None]
                else:
                    place = _Exact(len(kept))
                    kept.append(leaf)
                places[id(leaf)] = place
            self._recipe.append(place)
        self.kept = tuple(kept)
        self.payloads = tuple(payloads)

    def release(self):
        """Drop the tensors, of which the caller has taken charge."""
        self.kept = self.payloads = ()

    def decode(self, kept):
        """Make the arguments again.

        Args:
            kept (Sequence[Tensor | None]): Tensors in place of ``kept``,
                where the payloads may be those of another pass.

        Returns:
            tuple[tuple, dict]: Arguments and keyword arguments.
        """
        # One object for one object: the same tensor may have been given
        # twice.
        made = {}
        leaves = []
        for entry in self._recipe:
            if isinstance(entry, _Exact):
                entry = kept[entry.index]
            elif isinstance(entry, _Coded):
                if entry.start not in made:
                    payload = entry.format.payload(
                        *kept[entry.start : entry.stop]
                    )
                    anchor = torch.empty(0, device='cpu', requires_grad=True)
                    made[entry.start] = _Decode.apply(
                        anchor, payload, entry.shape
                    )
                entry = made[entry.start]
            leaves.append(entry)
        return tree_unflatten(leaves, self._spec)


def _choose(leaves):
    """Identities of the tensors that become codes."""
    tensors = {id(t): t for t in leaves if isinstance(t, torch.Tensor)}
    candidates = [t for t in tensors.values() if _can_code(t)]
    if not candidates:
        return frozenset()
    smallest = max(t.numel() for t in candidates) / MIN_FRACTION
    owners = {}
    for tensor in tensors.values():
        if is_ordinary(tensor):
            key = tensor.untyped_storage()._cdata
            owners[key] = owners.get(key, 0) + 1
    return {
        id(t)
        for t in candidates
        if t.numel() >= smallest
        # Writes to one would have to show in the other.
        and owners[t.untyped_storage()._cdata] == 1
    }


def _can_code(tensor):
    return (
        tensor.grad_fn is not None
        and tensor.dtype in VALID_DTYPES
        and tensor.numel() >= MIN_CODED
        and tensor.dim() > 0
        and is_ordinary(tensor)
        and has_kernels(tensor.device.type)
        # An expanded tensor is smaller than its codes.
        and 0 not in tensor.stride()
    )


def _payload_of(tensor, quantizer):
    """Payload of a tensor, one for all segments that read it."""
    rows = tensor.detach()
    if (
        tensor.dim() > 2
        and tensor.shape[-1] >= MIN_TOKEN
        and tensor.is_contiguous()
    ):
        rows = rows.flatten(0, -2)
    for form in (rows, tensor):
        payload = quantizer.find_shared(tensor, form)
        if payload is not None:
            return payload
    return quantizer.publish(tensor, tensor, quantizer.pack(rows))
