"""Memory layout of a model."""

import torch
from torch import nn


def use_channels_last(model):
    """Lay out the weights of a model's convolutions as channels_last.

    Convolutions of such weights make outputs of that layout from inputs of
    any, so that nothing else has to change. Depthwise convolutions, whose
    kernels for it are slower, and all parameters that are not dense
    four-dimensional weights of convolutions stay as they are. Parameters,
    their names and their values stay the same objects and numbers.

    Args:
        model (nn.Module): The model; it is changed in place.

    Returns:
        int: Number of convolutions in the layout.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, 'weight', None)
        if (
            isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
            and type(weight) is nn.Parameter
            and not _is_depthwise(module)
        ):
            weight.data = weight.data.contiguous(
                memory_format=torch.channels_last
            )
            count += 1
    return count


def _is_depthwise(conv):
    return conv.groups > 1 and conv.groups == conv.in_channels
