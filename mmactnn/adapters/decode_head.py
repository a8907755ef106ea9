"""Adapter of MMSegmentation's decode heads: losses of resized logits."""

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss, accuracy
from mmseg.models.losses.cross_entropy_loss import cross_entropy
from mmseg.models.losses.utils import weight_reduce_loss
from mmseg.models.utils import resize
from torch import nn

from ..fusion import plain_class_of
from ..fusion.eligibility import is_instrumented
from ..layers import QLosses, QResizedCrossEntropy
from ..layers.gateway import keeps_codes
from ..modules.functions import fingerprint
from ..registry import register_adapter
from .inserted import InsertedAdapter
from .losses import LossAdapter

# Functions that the adapter computes itself.
_LOSS = dict(
    forward=CrossEntropyLoss.forward,
    cross_entropy=cross_entropy,
    weight_reduce_loss=weight_reduce_loss,
    accuracy=accuracy,
)
_IS_KNOWN = fingerprint(_LOSS) == '99c59dadb78130cd'
_EPS = torch.finfo(torch.float32).eps


class _OtherDecodeHead(LossAdapter, BaseDecodeHead):
    """Decode head with losses of its own."""


@register_adapter(BaseDecodeHead, fingerprints=['077bd62968d3d856'])
class QDecodeHead(InsertedAdapter, BaseDecodeHead):
    """Decode head whose losses keep nothing of the labels' size.

    Logits are resized, and their cross entropy and accuracy computed, by
    :class:`mmactnn.QResizedCrossEntropy`. Of other losses, and those of heads
    that compute all of them themselves, the gradients of the small logits are
    made in the forward pass, by :class:`mmactnn.QLosses`.

    Args:
        *args: As ``BaseDecodeHead``.
        **kwargs: As ``BaseDecodeHead``.
    """

    method = 'loss_by_feat'

    @classmethod
    def serves(cls, plain):
        """See the base class."""
        return True

    @classmethod
    def derive(cls, plain):
        """See the base class."""
        if super().serves(plain):
            return super().derive(plain)
        return _OtherDecodeHead.derive(plain)

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        layers = dict(losses_of_outputs=QLosses())
        if any(map(_is_cross_entropy, _losses_of(module))) and super().serves(
            type(module)
        ):
            layers['resized_cross_entropy'] = QResizedCrossEntropy()
        return layers

    def loss_by_feat(self, seg_logits, batch_data_samples):
        """See ``BaseDecodeHead``."""
        parent = super().loss_by_feat
        others = self._modules.get('losses_of_outputs', _call)
        layer = self._modules.get('resized_cross_entropy')
        losses = _losses_of(self)
        if not any(map(_is_cross_entropy, losses)):
            return others(parent, seg_logits, batch_data_samples)
        if (
            layer is None
            or not isinstance(seg_logits, torch.Tensor)
            or not seg_logits.numel()
            or not keeps_codes(layer, seg_logits)
        ):
            return parent(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples)
        weight = None
        if self.sampler is not None:
            with torch.no_grad():
                large = self._resize(seg_logits, labels)
                weight = self.sampler.sample(large, labels)
                del large
        found = {}
        for loss in losses:
            if _is_cross_entropy(loss):
                value, correct = self._cross_entropy(
                    loss, seg_logits, labels.squeeze(1), weight
                )
            else:
                value = others(
                    self._loss_of_large, seg_logits, labels, loss, weight
                )
            name = loss.loss_name
            found[name] = found[name] + value if name in found else value
        valid = (labels != self.ignore_index).sum()
        percent = (100.0 / (valid.double() + _EPS)).float()
        found['acc_seg'] = (correct.float() + _EPS).reshape(1) * percent
        return found

    def _loss_of_large(self, seg_logits, labels, loss, weight):
        return loss(
            self._resize(seg_logits, labels),
            labels.squeeze(1),
            weight=weight,
            ignore_index=self.ignore_index,
        )

    def _resize(self, seg_logits, labels):
        return resize(
            input=seg_logits,
            size=labels.shape[2:],
            mode='bilinear',
            align_corners=self.align_corners,
        )

    def _cross_entropy(self, loss, seg_logits, labels, weight):
        """Value of MMSegmentation's loss, and number of hits."""
        class_weight = loss.class_weight
        if class_weight is not None:
            class_weight = seg_logits.new_tensor(class_weight)
        value, correct = self.resized_cross_entropy(
            seg_logits,
            labels,
            class_weight,
            weight,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
            reduction='none' if loss.reduction == 'none' else 'sum',
        )
        if loss.reduction == 'mean':
            valid = labels != self.ignore_index
            if class_weight is not None:
                weights = class_weight.float()[labels.where(valid, 0)]
                count = weights.mul_(valid).sum()
            elif loss.avg_non_ignore:
                count = valid.sum()
            else:
                count = torch.tensor(labels.numel())
            value = value / (count.double() + _EPS).float()
        return loss.loss_weight * value, correct


def _call(function, *args):
    return function(*args)


def _losses_of(head):
    losses = getattr(head, 'loss_decode', None)
    if losses is None:
        # A head made of other heads need not have any.
        return []
    return losses if isinstance(losses, nn.ModuleList) else [losses]


def _is_cross_entropy(loss):
    """Whether a loss is the cross entropy that the adapter computes."""
    return (
        _IS_KNOWN
        and plain_class_of(loss).forward is _LOSS['forward']
        and getattr(loss, 'cls_criterion', None) is cross_entropy
        and loss.reduction in ('none', 'mean', 'sum')
        # Stock code fails for both at once.
        and not (loss.avg_non_ignore and loss.class_weight is not None)
        and not is_instrumented(loss)
    )
