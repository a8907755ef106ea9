"""Resizing of logits and cross entropy as one function."""

import weakref
from typing import NamedTuple

import torch
from torch.autograd import Function

from .. import ops
from ..codes.calls import Call
from .double_backward import first_order_only
from .early_gradient import MIN_CODED_BYTES
from .placeholders import meta_tensor


class PixelLosses(NamedTuple):
    """Settings of the losses of pixels.

    Attributes:
        class_weight (Tensor[C], optional): float32 factors by label.
        align_corners (bool): As of ``F.interpolate``.
        ignore_index (int): Label of pixels without a loss.
    """

    class_weight: object
    align_corners: bool
    ignore_index: int


class _Sum(Function):
    """Weighted sum of the losses: keeps the gradient of the small logits."""

    @staticmethod
    def forward(ctx, logits, labels, scale, settings, quantizer):
        losses, log_sums, hits = ops.resized_cross_entropy(
            logits, labels, *settings
        )
        if scale is not None:
            losses *= scale
        gradient = ops.resized_cross_entropy_backward(
            logits,
            labels,
            log_sums,
            settings.class_weight,
            scale,
            settings.align_corners,
            settings.ignore_index,
        )
        ctx.format, kept = None, (gradient,)
        if gradient.nbytes >= MIN_CODED_BYTES:
            ctx.format, kept = quantizer.keep(gradient, needed=True)
        ctx.save_for_backward(*kept)
        ctx.dtype = logits.dtype
        ctx.memory_format = _memory_format_of(logits)
        ctx.source = weakref.ref(logits)
        _record(quantizer, kept, logits, labels, scale)
        total, correct = losses.sum(), hits.sum()
        ctx.mark_non_differentiable(correct)
        return total.to(_dtype_of_losses(logits)), correct

    @staticmethod
    @first_order_only('QResizedCrossEntropy')
    def backward(ctx, grad_total, _):
        if ctx.format is None:
            (gradient,) = ctx.saved_tensors
        else:
            gradient = ctx.format.payload(*ctx.saved_tensors).unpack()
        # Pixels that are ignored have none, even of a mean over no pixel.
        grad_logits = (gradient * grad_total.float()).masked_fill_(
            gradient == 0, 0
        )
        grad_logits = grad_logits.to(
            ctx.dtype, memory_format=ctx.memory_format
        )
        return grad_logits, None, None, None, None


class _Each(Function):
    """The losses: keeps the small logits and the labels."""

    @staticmethod
    def forward(ctx, logits, labels, settings, quantizer):
        losses, _, hits = ops.resized_cross_entropy(logits, labels, *settings)
        ctx.save_for_backward(logits, labels, settings.class_weight)
        ctx.settings = settings._replace(class_weight=None)
        _record(quantizer, (logits, labels), logits, labels)
        correct = hits.sum()
        ctx.mark_non_differentiable(correct)
        return losses.to(_dtype_of_losses(logits)), correct

    @staticmethod
    @first_order_only('QResizedCrossEntropy')
    def backward(ctx, grad_losses, _):
        logits, labels, class_weight = ctx.saved_tensors
        _, align_corners, ignore_index = ctx.settings
        settings = class_weight, align_corners, ignore_index
        _, log_sums, _ = ops.resized_cross_entropy(logits, labels, *settings)
        gradient = ops.resized_cross_entropy_backward(
            logits,
            labels,
            log_sums,
            class_weight,
            grad_losses.float().contiguous(),
            align_corners,
            ignore_index,
        )
        grad_logits = gradient.to(
            logits.dtype, memory_format=_memory_format_of(logits)
        )
        return grad_logits, None, None, None


def resized_cross_entropy(
    logits, labels, settings, quantizer, pixel_weight=None, each=False
):
    """Cross entropy of logits that are resized to their labels.

    Neither the large logits nor their logarithms exist: see
    :func:`mmactnn.ops.resized_cross_entropy`. The value is exact. So is the
    gradient of losses by pixel; that of their sum is made in the forward pass
    and kept: exactly below 1 MiB, else as codes, hence unbiased.

    Args:
        logits (Tensor[N, C, h, w]): float32, float16 or bfloat16.
        labels (Tensor[N, H, W]): int64 or uint8.
        settings (PixelLosses): Settings.
        quantizer (LayerQuantizer): Settings of the layer.
        pixel_weight (Tensor[N, H, W], optional): Factors of the losses,
            without a gradient. Defaults to ones.
        each (bool, optional): Whether to return the loss of each pixel.
            Defaults to False, for their sum.

    Returns:
        tuple[Tensor, Tensor]: The losses (Tensor[N, H, W]) or their sum
        (Tensor[]), float32 under autocast and of the logits' dtype else; and
        the number of pixels whose largest logit is that of the label
        (Tensor[], int64).
    """
    labels = labels.contiguous()
    if pixel_weight is not None:
        pixel_weight = pixel_weight.float().expand(labels.shape)
    if not each:
        if pixel_weight is not None:
            pixel_weight = pixel_weight.contiguous()
        return _Sum.apply(logits, labels, pixel_weight, settings, quantizer)
    losses, correct = _Each.apply(logits, labels, settings, quantizer)
    if pixel_weight is not None:
        losses = losses * pixel_weight
    return losses, correct


def _memory_format_of(tensor):
    if ops.layout.suggests_channels_last(tensor):
        return torch.channels_last
    return torch.contiguous_format


def _dtype_of_losses(logits):
    """Dtype in which torch computes the losses of logits."""
    casts = torch.is_autocast_enabled(logits.device.type)
    return torch.float32 if casts else logits.dtype


def _record(quantizer, kept, logits, labels, scale=None):
    if quantizer.meter is None:
        return
    # The logarithm of the softmax of the large logits.
    output = meta_tensor(
        (*logits.shape[:2], *labels.shape[1:]), _dtype_of_losses(logits)
    )
    quantizer.record(kept, Call(labels, output, mask=scale))
