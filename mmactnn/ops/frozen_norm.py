"""Normalisation by constants, fused with addition and ReLU."""

import torch

from ._fake import fake
from .channel_stats import check_channels, check_vector

__all__ = ['MAX_FROZEN_CHANNELS', 'frozen_norm_act_']

# Limit of channels, whose constants lie in shared memory of the GPU.
MAX_FROZEN_CHANNELS = 4096


def frozen_norm_act_(input, residual, mean, var, weight, bias, eps, relu):
    """Normalise by constants, with optional addition and ReLU, in place.

    For layers that are not trained and keep nothing: one pass over memory in
    place of one for each layer. Computes ``input * scale + (bias - mean *
    scale)`` with ``scale = weight / sqrt(var + eps)``, each operation in
    float32.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16, of 2 to 5
            dimensions, contiguous or channels_last; overwritten.
        residual (Tensor[N, C, *], optional): Of the dtype, shape and strides
            of ``input``; added before the ReLU.
        mean (Tensor[C]): float32.
        var (Tensor[C]): float32.
        weight (Tensor[C], optional): float32; 1 if None.
        bias (Tensor[C], optional): float32; 0 if None.
        eps (float): Added to the variance.
        relu (bool): Whether to rectify. NaN stays.

    Raises:
        ValueError: If ``input`` has not 2 to 5 dimensions, or a parameter is
            not of shape [C].
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels, ``input`` is not dense,
            has more than 4096 channels on a GPU, or the others do not fit
            it.
    """
    check_channels(input)
    named = dict(mean=mean, var=var, weight=weight, bias=bias)
    for name, tensor in named.items():
        if tensor is not None:
            check_vector(tensor, (input.shape[1],), name)
    torch.ops.mmactnn.frozen_norm_act_.default(
        input, residual, mean, var, weight, bias, eps, relu
    )


@fake('frozen_norm_act_')
def _fake_frozen_norm_act_(
    input, residual, mean, var, weight, bias, eps, relu
):
    pass
