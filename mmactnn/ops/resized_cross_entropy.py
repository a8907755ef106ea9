"""Cross entropy of logits that are resized to their labels, in one pass."""

import torch

from ._fake import fake
from .quantize import check_input

__all__ = ['resized_cross_entropy', 'resized_cross_entropy_backward']


def resized_cross_entropy(
    logits, labels, class_weight, align_corners, ignore_index
):
    """Cross entropy of each pixel of logits that are resized bilinearly.

    As ``F.interpolate`` to the size of the labels, without antialiasing, and
    ``F.cross_entropy(reduction='none')``, but the large logits never exist:
    each is computed where it is needed, in the dtype of the small ones.
    Exponentials and their sum are float32.

    Args:
        logits (Tensor[N, C, h, w]): float32, float16 or bfloat16, of any
            strides.
        labels (Tensor[N, H, W]): int64 or uint8, contiguous.
        class_weight (Tensor[C], optional): float32 factors of the losses, by
            label; ones if None.
        align_corners (bool): As of ``F.interpolate``.
        ignore_index (int): Label of pixels without a loss.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Losses (Tensor[N, H, W], float32), 0
        for ignored pixels and NaN for labels that are no class; logarithms of
        the sums of exponentials (Tensor[N, H, W], float32); and whether the
        largest logit, the first of equal ones, is that of the label
        (Tensor[N, H, W], uint8), 0 for ignored pixels.

    Raises:
        TypeError: If the dtype of the logits is not supported.
        RuntimeError: If the device has no kernels, or shapes and dtypes do
            not fit.
    """
    check_input(logits)
    return torch.ops.mmactnn.resized_cross_entropy.default(
        logits, labels, class_weight, align_corners, ignore_index
    )


def resized_cross_entropy_backward(
    logits, labels, log_sums, class_weight, scale, align_corners, ignore_index
):
    """Gradient of a weighted sum of the losses of resized logits.

    Sums are float32 and in a fixed order, without atomic operations. At most
    32 MiB of row sums are in memory at once, or those of one class of an
    image.

    Args:
        logits (Tensor[N, C, h, w]): See :func:`resized_cross_entropy`.
        labels (Tensor[N, H, W]): Likewise.
        log_sums (Tensor[N, H, W]): From there.
        class_weight (Tensor[C], optional): See there.
        scale (Tensor[N, H, W], optional): float32 gradients of the losses;
            ones if None.
        align_corners (bool): See there.
        ignore_index (int): See there.

    Returns:
        Tensor[N, C, h, w]: float32, contiguous.

    Raises:
        TypeError: If the dtype of the logits is not supported.
        RuntimeError: If the device has no kernels, or shapes and dtypes do
            not fit.
    """
    check_input(logits)
    return torch.ops.mmactnn.resized_cross_entropy_backward.default(
        logits,
        labels,
        log_sums,
        class_weight,
        scale,
        align_corners,
        ignore_index,
    )


@fake('resized_cross_entropy')
def _fake_resized_cross_entropy(
    logits, labels, class_weight, align_corners, ignore_index
):
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    return losses, torch.empty_like(losses), losses.to(torch.uint8)


@fake('resized_cross_entropy_backward')
def _fake_resized_cross_entropy_backward(
    logits, labels, log_sums, class_weight, scale, align_corners, ignore_index
):
    return logits.new_empty(logits.shape, dtype=torch.float32)
