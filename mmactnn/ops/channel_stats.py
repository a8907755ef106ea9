"""Mean and variance of channels."""

import torch

from ._fake import fake
from .layout import dense_channels
from .quantize import check_input

__all__ = ['channel_stats']


def check_channels(tensor, name='input'):
    """Check that a tensor has channels.

    Args:
        tensor (Tensor[N, C, *]): Any.
        name (str, optional): Its name in errors. Defaults to ``'input'``.

    Raises:
        ValueError: If it has not 2 to 5 dimensions.
        TypeError: If the dtype is not supported.
        RuntimeError: If the device has no kernels.
    """
    check_input(tensor)
    if not 2 <= tensor.dim() <= 5:
        raise ValueError(
            f'{name} must have 2 to 5 dimensions, got shape '
            f'{tuple(tensor.shape)}'
        )


def check_vector(tensor, shape, name):
    """Check a parameter or statistic of channels.

    Raises:
        ValueError: If it is not of this shape.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f'{name} must be of shape {shape}, got {tuple(tensor.shape)}'
        )


def channel_stats(input, eps, momentum, running_mean, running_var):
    """Mean and variance of every channel; updates running statistics.

    Sums are over differences from elements of the channel, in a fixed order:
    a mean far from zero costs no accuracy, and two calls on one device give
    equal numbers.

    Args:
        input (Tensor[N, C, *]): float32, float16 or bfloat16, of 2 to 5
            dimensions. Contiguous and channels_last tensors are read in
            place, others are copied first.
        eps (float): Added to the variance.
        momentum (float): Weight of this batch in the running statistics.
        running_mean (Tensor[C], optional): float32, float16 or bfloat16,
            contiguous; updated in place. None: no running statistics.
        running_var (Tensor[C], optional): Likewise, of the same dtype; gets
            the unbiased variance, as in torch.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Mean, biased variance and
        ``1 / sqrt(variance + eps)`` (Tensor[C], float32). For a tensor
        without elements the first two are 0, and the running statistics are
        not changed.

    Raises:
        ValueError: If ``input`` has not 2 to 5 dimensions, or the running
            statistics are not of shape [C].
        TypeError: If a dtype is not supported.
        RuntimeError: If the device has no kernels, or the running statistics
            are not contiguous, of two dtypes or on another device.
    """
    check_channels(input)
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            'running_mean and running_var must both be given or both be None'
        )
    if running_mean is not None:
        shape = (input.shape[1],)
        check_vector(running_mean, shape, 'running_mean')
        check_vector(running_var, shape, 'running_var')
    return torch.ops.mmactnn.channel_stats.default(
        dense_channels(input), eps, momentum, running_mean, running_var
    )


@fake('channel_stats')
def _fake_channel_stats(input, eps, momentum, running_mean, running_var):
    def empty():
        return input.new_empty((input.shape[1],), dtype=torch.float32)

    return empty(), empty(), empty()
