"""Masks and summands of attention's scores, kept as little as they are."""

from torch.autograd import Function

from ..codes.exact import BoolTensor
from ..extension import has_kernels
from ..ops.layout import is_dense

# Booleans from which on bits are worth their kernels.
_MIN_BOOLS = 1 << 14


def keep_term(term, cache):
    """Choose what is kept of a mask or summand; it is restored exactly.

    Large masks are kept as bits, once for all layers that read one mask, and
    summands that were chosen from a table as the table and the index.

    Args:
        term (Tensor[*]): bool, float32, float16 or bfloat16.
        cache (PayloadCache): Payloads that the layers of the model share.

    Returns:
        tuple[PayloadFormat | None, tuple[Tensor]]: Format of a payload, and
        its tensors; None and the term itself where that is kept.
    """
    payload = cache.get(term)
    if payload is None and not term.is_floating_point():
        payload = _bits_of(term, cache)
    if (
        payload is None
        or not payload.is_exact
        or payload.format.dtype != term.dtype
    ):
        return None, (term,)
    return payload.format, payload.tensors


def _bits_of(mask, cache):
    """Payload of a large mask, or None for others."""
    if (
        mask.numel() < _MIN_BOOLS
        or not is_dense(mask)
        or not has_kernels(mask.device.type)
    ):
        return None
    # Layers view a mask that they share, each for itself.
    whole = mask if mask._base is None else mask._base
    if whole.numel() != mask.numel():
        return BoolTensor.pack(mask)
    payload = cache.get(whole)
    if (
        payload is None
        or payload.format.size != mask.shape
        or payload.format.stride != mask.stride()
    ):
        payload = BoolTensor.pack(mask)
        cache.put(whole, payload)
    return payload


class _Raised(Function):
    @staticmethod
    def forward(ctx, term, lowest):
        return term.clamp(min=lowest)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def raise_term(term, lowest):
    """Raise summands of scores to the lowest number of a dtype.

    Nothing is kept: what is raised hides a key, and has no gradient.

    Args:
        term (Tensor[*]): The summand.
        lowest (float): The number.

    Returns:
        Tensor[*]: The summand with no lower numbers; NaN stays.
    """
    return _Raised.apply(term, lowest)


def restore_term(format, tensors):
    """Restore a mask or summand.

    Args:
        format (PayloadFormat, optional): From :func:`keep_term`.
        tensors (Sequence[Tensor]): From there.

    Returns:
        Tensor[*]: The term.
    """
    if format is None:
        (term,) = tensors
        return term
    return format.payload(*tensors).unpack()
