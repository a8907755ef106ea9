"""Losses that keep less than torch's."""

import torch
import torch.nn.functional as F
from torch import nn

from ..autograd import PixelLosses, inputs_of, run_loss
from ..autograd import resized_cross_entropy as compressed_loss
from ..registry import register_layer
from .base import CodedLayer
from .gateway import keeps_codes, run

# Bits of an element of a loss's gradient.
_LOSS_BITS = 8
_REDUCTIONS = ('none', 'mean', 'sum')
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LABEL_DTYPES = (torch.int64, torch.uint8)


class LossLayer(CodedLayer):
    """Mixin of the layers that keep the gradient of a loss as codes.

    The bits are not adaptive, as all gradients before depend on them.
    """

    kind = 'act'
    shares_bits = False

    @classmethod
    def level_bits(cls, level):
        """See the base class."""
        return None if level.act is None else _LOSS_BITS


class ResizedCrossEntropy(nn.Module):
    """Cross entropy of logits that are resized to their labels, as a layer.

    As ``F.interpolate(mode='bilinear')`` to the size of the labels, and
    ``F.cross_entropy``.
    """

    def forward(
        self,
        logits,
        labels,
        class_weight=None,
        pixel_weight=None,
        ignore_index=-100,
        align_corners=False,
        reduction='mean',
    ):
        """Compute the loss, and count the pixels that are right.

        Args:
            logits (Tensor[N, C, h, w]): Small logits.
            labels (Tensor[N, H, W]): int64 or uint8.
            class_weight (Tensor[C], optional): Factors of the losses by
                label. Defaults to ones.
            pixel_weight (Tensor[N, H, W], optional): Factors of the losses
                by pixel. Defaults to ones.
            ignore_index (int, optional): Label of pixels without a loss.
                Defaults to -100.
            align_corners (bool, optional): As of ``F.interpolate``. Defaults
                to False.
            reduction (str, optional): ``'none'``, ``'sum'`` or ``'mean'``,
                which divides the sum by that of the class weights of all
                pixels that are not ignored, whatever their pixel weights.
                Defaults to ``'mean'``.

        Returns:
            tuple[Tensor, Tensor]: The loss, and the number of pixels whose
            largest logit is that of the label (Tensor[], int64), ignored ones
            apart.

        Raises:
            ValueError: If there is no such reduction.
        """
        _check_reduction(reduction)
        large = F.interpolate(
            logits,
            labels.shape[1:],
            mode='bilinear',
            align_corners=align_corners,
        )
        losses = F.cross_entropy(
            large,
            labels,
            class_weight,
            ignore_index=ignore_index,
            reduction='none',
        )
        valid = labels != ignore_index
        correct = ((large.argmax(1) == labels) & valid).sum()
        if pixel_weight is not None:
            losses = losses * pixel_weight
        if reduction == 'none':
            return losses, correct
        total = losses.sum()
        if reduction == 'mean':
            total = total / _divisor(labels, class_weight, ignore_index)
        return total, correct


@register_layer(
    ResizedCrossEntropy,
    # Logarithms of the softmax of the large logits, labels and weights.
    saved_by_torch=lambda call: (call.output, call.input, call.mask),
)
class QResizedCrossEntropy(LossLayer, ResizedCrossEntropy):
    """``ResizedCrossEntropy`` that keeps nothing of the labels' size.

    The large logits are computed where they are needed. For a sum or a mean
    the gradient of the small logits is made in the forward pass, and kept
    exactly below 1 MiB, else as codes; for losses by pixel, small logits and
    labels are kept. The value is exact and the gradient unbiased. On a GPU,
    labels that are no class make the loss NaN. In eval mode, without grad and
    at level L0 it is ``ResizedCrossEntropy``.

    Args:
        bits (int, optional): Bits an element of the gradient at every level
            but L0. Valid values are 1 to 8. Defaults to 8.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.

    Examples:
        >>> logits = torch.randn(2, 5, 8, 8, requires_grad=True)
        >>> labels = torch.randint(5, (2, 64, 64))
        >>> loss, correct = QResizedCrossEntropy()(logits, labels)
        >>> loss.backward()
    """

    def forward(
        self,
        logits,
        labels,
        class_weight=None,
        pixel_weight=None,
        ignore_index=-100,
        align_corners=False,
        reduction='mean',
    ):
        """See ``ResizedCrossEntropy``."""
        return run(
            self,
            ResizedCrossEntropy.forward,
            QResizedCrossEntropy._compress,
            (
                logits,
                labels,
                class_weight,
                pixel_weight,
                ignore_index,
                align_corners,
                reduction,
            ),
            (class_weight, pixel_weight),
        )

    def _compress(
        self,
        logits,
        labels,
        class_weight,
        pixel_weight,
        ignore_index,
        align_corners,
        reduction,
    ):
        _check_reduction(reduction)
        if not _is_supported(
            logits, labels, class_weight, pixel_weight, ignore_index
        ):
            # Torch's own errors are among these cases.
            return ResizedCrossEntropy.forward(
                self,
                logits,
                labels,
                class_weight,
                pixel_weight,
                ignore_index,
                align_corners,
                reduction,
            )
        if class_weight is not None:
            class_weight = class_weight.float().contiguous()
        loss, correct = compressed_loss(
            logits,
            labels,
            PixelLosses(class_weight, align_corners, ignore_index),
            self.quantizer,
            pixel_weight,
            reduction == 'none',
        )
        if reduction == 'mean':
            loss = loss / _divisor(labels, class_weight, ignore_index)
        return loss, correct


@register_layer(
    nn.CrossEntropyLoss,
    saved_by_torch=lambda call: call.statistics,
)
class QCrossEntropyLoss(LossLayer, nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` that keeps its gradient as codes.

    Torch keeps the logarithm of the softmax in float32. Here the gradient is
    made in the forward pass, and kept exactly below 1 MiB, else as codes. The
    value is torch's and the gradient unbiased. In eval mode, without grad, at
    level L0, for float16 logits and without reduction it is
    ``nn.CrossEntropyLoss``.

    Args:
        *args: As ``nn.CrossEntropyLoss``.
        bits (int, optional): Bits an element of the gradient at every level
            but L0. Valid values are 1 to 8. Defaults to 8.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.CrossEntropyLoss``.

    Examples:
        >>> logits = torch.randn(4, 1000, requires_grad=True)
        >>> QCrossEntropyLoss()(logits, torch.randint(1000, (4,))).backward()
    """

    def forward(self, input, target):
        """See ``nn.CrossEntropyLoss``."""
        return run(
            self,
            nn.CrossEntropyLoss.forward,
            QCrossEntropyLoss._compress,
            (input, target),
            (self.weight,),
        )

    def _compress(self, input, target):
        if self.reduction == 'none':
            return nn.CrossEntropyLoss.forward(self, input, target)
        return run_loss(
            nn.CrossEntropyLoss.forward,
            (self, input, target),
            {},
            self.quantizer,
        )


class Losses(nn.Module):
    """Call of a function that computes losses, as a layer."""

    def forward(self, function, *args, **kwargs):
        """Call the function.

        Args:
            function (Callable): The function.
            *args (object): Its arguments.
            **kwargs (object): Its keyword arguments.

        Returns:
            object: Its results.
        """
        return function(*args, **kwargs)


@register_layer(Losses, saved_by_torch=lambda call: call.statistics)
class QLosses(LossLayer, Losses):
    """``Losses`` that keeps their gradients, and nothing else.

    The gradients of all losses with respect to the tensors among the arguments
    are made in the forward pass, and kept exactly below 1 MiB, else as codes.
    Values are the function's and gradients unbiased. The function runs as
    written in eval mode, without grad, at level L0, with float16 arguments,
    and if its results depend on parameters or anything else that requires a
    gradient and is not among its arguments.

    Args:
        bits (int, optional): Bits an element of a gradient at every level
            but L0. Valid values are 1 to 8. Defaults to 8.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.

    Examples:
        >>> x = torch.randn(4, 3, requires_grad=True)
        >>> QLosses()(torch.nn.functional.l1_loss, x, torch.zeros(4, 3))
    """

    def forward(self, function, *args, **kwargs):
        """See ``Losses``."""
        inputs = inputs_of(args, kwargs)
        if (
            not inputs
            or torch.compiler.is_compiling()
            or not keeps_codes(self, inputs[0], inputs[1:])
        ):
            return function(*args, **kwargs)
        return run_loss(function, args, kwargs, self.quantizer)


def _check_reduction(reduction):
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f'reduction must be one of {", ".join(_REDUCTIONS)}, got '
            f'{reduction!r}'
        )


def _divisor(labels, class_weight, ignore_index):
    """Sum of the class weights of all pixels that are not ignored."""
    valid = labels != ignore_index
    if class_weight is None:
        return valid.sum()
    return class_weight[labels.where(valid, 0).long()].mul(valid).sum()


def _is_supported(logits, labels, class_weight, pixel_weight, ignore_index):
    if (
        logits.dtype not in _FLOATS
        or logits.dim() != 4
        or labels.dim() != 3
        or labels.dtype not in _LABEL_DTYPES
        or labels.device != logits.device
        or labels.shape[0] != logits.shape[0]
        or 0 in (*logits.shape, *labels.shape)
    ):
        return False
    for weight, shape in (
        (class_weight, (logits.shape[1],)),
        (pixel_weight, labels.shape),
    ):
        if weight is not None and (
            weight.requires_grad
            or weight.shape != shape
            or weight.device != logits.device
        ):
            return False
    if labels.is_cuda:
        # Reading the labels would wait for the GPU.
        return True
    classes = (labels >= 0) & (labels < logits.shape[1])
    return bool((classes | (labels == ignore_index)).all())
