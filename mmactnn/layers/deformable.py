"""The compressed sampling of deformable attention."""

from torch import nn

from ..autograd import deformable_attention
from ..ops.quantize import VALID_DTYPES
from ..registry import register_layer
from .base import CodedLayer
from .gateway import run


class DeformableSampling(nn.Module):
    """Softmax of weights and weighted sum of sampled values, as a layer."""

    def forward(self, value, locations, logits, sampler):
        """Sample.

        Args:
            value (Tensor[N, K, H, C]): Values.
            locations (Tensor[N, Q, H, L, P, 2]): Sampling locations.
            logits (Tensor[N, Q, H, L * P]): Weights before their softmax.
            sampler (Callable): Maps value, locations and weights
                (Tensor[N, Q, H, L, P]) to the output.

        Returns:
            Tensor[N, Q, H * C]: The output.
        """
        weights = logits.softmax(-1).view(locations.shape[:-1])
        return sampler(value, locations, weights)


@register_layer(
    DeformableSampling,
    # Its tensors are recorded one by one.
    saved_by_torch=lambda call: (),
)
class QDeformableSampling(CodedLayer, DeformableSampling):
    """``DeformableSampling`` that keeps codes of values and weights.

    Locations are kept in 16 bits. The output is exact, and the backward pass
    samples again. In eval mode, without grad and at level L0 it is
    ``DeformableSampling``.

    Args:
        bits (int, optional): Bits an element of values and weights at every
            level but L0. Valid values are 1 to 8. Defaults to the level's for
            attention.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
    """

    kind = 'attention'
    shares_bits = False

    def forward(self, value, locations, logits, sampler):
        """See :class:`DeformableSampling`."""
        return run(
            self,
            DeformableSampling.forward,
            QDeformableSampling._compress,
            (value, locations, logits, sampler),
            (locations, logits),
        )

    def _compress(self, value, locations, logits, sampler):
        tensors = value, locations, logits
        if not all(x.numel() and x.dtype in VALID_DTYPES for x in tensors):
            return DeformableSampling.forward(
                self, value, locations, logits, sampler
            )
        return deformable_attention(
            sampler, value, locations, logits, self.quantizer
        )
