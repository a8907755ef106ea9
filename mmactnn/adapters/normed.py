"""Layers for MMDetection's predictors of cosines."""

from mmdet.models.layers.normed_predictor import NormedConv2d

from ..layers.conv import DerivedConv
from ..layers.gateway import run
from ..registry import register_layer


@register_layer(
    NormedConv2d, saved_by_torch=lambda call: (call.input, call.weight)
)
class QNormedConv2d(DerivedConv, NormedConv2d):
    """MMDetection's ``NormedConv2d`` that keeps its input as codes.

    The normalised weight, which torch keeps for each feature level, is
    computed again in the backward pass. What the normalisation of the input
    keeps stays exact. Output and gradient of the input are exact, the
    weight's gradient is unbiased. In eval mode, without grad and at level L0
    it is ``NormedConv2d``.

    Args:
        *args: As ``NormedConv2d``.
        bits (int, optional): As ``QConv2d``.
        group_size (int, optional): As ``QConv2d``.
        **kwargs: As ``NormedConv2d``.
    """

    def forward(self, x):
        """See ``NormedConv2d``."""
        return run(
            self,
            NormedConv2d.forward,
            QNormedConv2d._convolve_input,
            (x,),
            (self.weight, self.bias),
        )

    def derive_weight(self, weight):
        """See the base class."""
        if self.norm_over_kernel:
            norm = weight.view(weight.size(0), -1).norm(dim=1, keepdim=True)
            norm = norm[..., None, None]
        else:
            norm = weight.norm(dim=1, keepdim=True)
        return weight / (norm.pow(self.power) + self.eps)

    def _convolve_input(self, x):
        norm = x.norm(dim=1, keepdim=True).pow(self.power)
        x = x / (norm + self.eps) * self.temperature
        return self._compress(x, self.weight, self.bias)
