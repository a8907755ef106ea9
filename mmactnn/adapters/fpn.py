"""Adapter of the feature pyramid of MMDetection and MMSegmentation."""

import torch.nn.functional as F

from ..layers import QMaxPool2d, QReLU
from .base import Adapter
from .parallel import ParallelConvs, run_convs


class FPNAdapter(Adapter):
    """Mixin of ``FPN`` whose extra levels come from layers.

    The lateral convolutions run as one chain where their inputs are small,
    and so do the output convolutions.
    """

    @classmethod
    def make_layers(cls, module):
        """See the base class."""
        extra = module.num_outs - len(module.lateral_convs)
        if extra > 0 and not module.add_extra_convs:
            return dict(extra_pool=QMaxPool2d(1, stride=2))
        # There is no ReLU before the first of the extra convolutions.
        if extra > 1 and module.relu_before_extra_convs:
            return dict(extra_relu=QReLU())
        return {}

    def adapted_forward(self, inputs):
        """Merge feature maps from the top down; see ``FPN``."""
        run_laterals = run_outputs = run_convs
        if self.may_chain():
            run_laterals = self.get_runner('laterals', ParallelConvs)
            run_outputs = self.get_runner('outputs', ParallelConvs)
        return run_fpn(self, inputs, run_laterals, run_outputs)


def run_fpn(neck, inputs, run_laterals, run_outputs):
    """Merge feature maps from the top down.

    Args:
        neck (nn.Module): An ``FPN`` that has the layers of
            :meth:`FPNAdapter.make_layers`.
        inputs (Sequence[Tensor[N, C, H, W]]): The maps, the finest first.
        run_laterals (Callable): Runs the lateral convolutions; takes the
            arguments of :func:`run_convs`.
        run_outputs (Callable): Runs the output convolutions, likewise.

    Returns:
        tuple[Tensor[N, O, H, W]]: The merged maps.

    Raises:
        ValueError: If the number of inputs is not that of the neck.
    """
    if len(inputs) != len(neck.in_channels):
        raise ValueError(
            f'inputs must be {len(neck.in_channels)} feature maps, got '
            f'{len(inputs)}'
        )
    levels = list(inputs[neck.start_level : neck.backbone_end_level])
    laterals = _merge(neck, run_laterals(neck.lateral_convs, levels))
    coarsest = laterals[-1]
    convs = list(neck.fpn_convs)
    own, extra_convs = convs[: len(laterals)], convs[len(laterals) :]
    outs = run_outputs(own, laterals)
    if not neck.add_extra_convs:
        while len(outs) < neck.num_outs:
            outs.append(neck.extra_pool(outs[-1]))
    elif len(outs) < neck.num_outs:
        source = {
            'on_input': inputs[neck.backbone_end_level - 1],
            'on_lateral': coarsest,
            'on_output': outs[-1],
        }[neck.add_extra_convs]
        outs.append(extra_convs[0](source))
        for conv in extra_convs[1:]:
            if neck.relu_before_extra_convs:
                source = neck.extra_relu(outs[-1])
            else:
                source = outs[-1]
            outs.append(conv(source))
    return tuple(outs)


def _merge(neck, laterals):
    """Add the coarser maps to each lateral map."""
    for i in range(len(laterals) - 1, 0, -1):
        size = None
        if 'scale_factor' not in neck.upsample_cfg:
            size = laterals[i - 1].shape[2:]
        # The sum overwrites the upsampled map, to which nothing else refers.
        # An activation or a hook may have kept the lateral map.
        merged = F.interpolate(laterals[i], size=size, **neck.upsample_cfg)
        merged += laterals[i - 1]
        laterals[i - 1] = merged
    return laterals
