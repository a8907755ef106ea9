"""Which layers can take part in a block that is fused."""

from ..layers import (
    QBatchNorm,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QReLU,
    QSyncBatchNorm,
)
from .watched import is_watched

NORMS = (QBatchNorm, QBatchNorm1d, QBatchNorm2d, QBatchNorm3d, QSyncBatchNorm)


def may_join(norm):
    """Whether a normalisation can take part now.

    A block that has been wrapped stays what it is when the model is reverted.

    Args:
        norm (nn.Module): What is in its place.
    """
    return isinstance(norm, NORMS) and not is_watched(norm)


def may_be_passed_over(relu):
    """Whether a ReLU need not be called where its input is rectified.

    Args:
        relu (nn.Module): What is in its place.
    """
    return isinstance(relu, QReLU) and not is_watched(relu)
