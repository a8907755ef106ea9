"""Deformable attention that keeps codes of what it samples."""

import weakref
from typing import NamedTuple

import torch
from torch.autograd import Function

from ..codes.calls import Call
from ..codes.payload import CentredTensor
from .attention import Replay, without_hooks
from .double_backward import first_order_only
from .placeholders import meta_tensor

# Locations are kept as integers of 16 bits, for places of the image and as
# much beside it: everything farther away samples zeros.
_STEPS = 21_000


class _FixedPoint(NamedTuple):
    """Form of locations that are kept in 16 bits.

    Attributes:
        dtype (torch.dtype): Their dtype.
    """

    dtype: torch.dtype

    @staticmethod
    def encode(locations):
        """Integers of locations; NaN becomes a place outside."""
        steps = locations.float().sub(0.5).mul_(_STEPS).round_()
        steps = steps.nan_to_num_(32_767).clamp_(-32_767, 32_767)
        return steps.to(torch.int16)

    def decode(self, steps):
        """Locations of integers."""
        return steps.float().div_(_STEPS).add_(0.5).to(self.dtype)


class _Deformable(Function):
    @staticmethod
    def forward(ctx, sampler, quantizer, value, locations, logits):
        ctx.sampler = sampler
        ctx.replay = Replay.now(value.device.type)
        tensors = value, locations, logits
        needs = ctx.needs_input_grad[2:]
        with ctx.replay.restored(), without_hooks():
            leaves = [
                x.detach().requires_grad_(needed)
                for x, needed in zip(tensors, needs)
            ]
            output = _sample(sampler, *leaves).detach()
        pack = quantizer.at_bits(quantizer.attention_bits.query_key).pack
        payloads = (
            pack(value.detach()),
            CentredTensor.pack(logits.detach().flatten(2), pack),
        )
        ctx.formats = [payload.format for payload in payloads]
        ctx.locations = _FixedPoint(locations.dtype)
        kept = *payloads[0].tensors, *payloads[1].tensors
        ctx.num_value = len(payloads[0].tensors)
        steps = ctx.locations.encode(locations.detach())
        ctx.save_for_backward(*kept, steps)
        ctx.shape = logits.shape
        ctx.source = weakref.ref(value)
        if quantizer.meter is not None:
            weights = meta_tensor(logits.shape, logits.dtype)
            exact = value, locations, weights
            quantizer.record((*kept, steps), Call(), exact)
        return output

    @staticmethod
    @first_order_only('Deformable attention')
    def backward(ctx, grad_output):
        *kept, steps = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        value = ctx.formats[0].payload(*kept[: ctx.num_value]).unpack()
        logits = ctx.formats[1].payload(*kept[ctx.num_value :]).unpack()
        leaves = [
            x.detach().requires_grad_(needed)
            for x, needed in zip(
                (value, ctx.locations.decode(steps), logits.view(ctx.shape)),
                needs,
            )
        ]
        with ctx.replay.restored(), without_hooks():
            output = _sample(ctx.sampler, *leaves)
            wanted = [x for x, needed in zip(leaves, needs) if needed]
            found = iter(torch.autograd.grad(output, wanted, grad_output))
        grads = [next(found) if needed else None for needed in needs]
        return None, None, *grads


def _sample(sampler, value, locations, logits):
    weights = logits.softmax(-1).view(locations.shape[:-1])
    return sampler(value, locations, weights)


def deformable_attention(sampler, value, locations, logits, quantizer):
    """Weighted sum of values at sampling locations, from codes.

    The output is exact. Values and logits of weights are kept as codes with
    the bits of queries, the latter with means of channels, and locations in
    16 bits: the backward pass decodes them, and differentiates softmax and
    sampling again. The gradient is linear in values; codes of logits give it
    a bias of second order, and locations one of a hundredth of a pixel in
    images of 400.

    Args:
        sampler (Callable): Maps value, locations and weights to the output.
        value (Tensor[N, K, H, C]): Values: float32, float16 or bfloat16.
        locations (Tensor[N, Q, H, L, P, 2]): Sampling locations, in [0, 1]
            within the image.
        logits (Tensor[N, Q, H, L * P]): Weights before their softmax.
        quantizer (LayerQuantizer): Settings, with ``attention_bits``.

    Returns:
        Tensor[N, Q, H * C]: The output.
    """
    return _Deformable.apply(sampler, quantizer, value, locations, logits)
