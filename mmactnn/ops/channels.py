"""Channel dimension and memory format of tensors."""

import torch

# Keys are numbers of dimensions.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channel_shape(tensor):
    """Shape that lets a vector of channels broadcast.

    Args:
        tensor (Tensor[N, C, *]): The other operand.

    Returns:
        list[int]: ``[1, -1, 1, ...]``.
    """
    return [1, -1] + [1] * (tensor.dim() - 2)


def dims_but_channels(tensor):
    """Dimensions to reduce for a statistic of each channel.

    Args:
        tensor (Tensor[N, C, *]): Tensor to reduce.

    Returns:
        list[int]: All dimensions but 1.
    """
    return [d for d in range(tensor.dim()) if d != 1]


def memory_format(tensor):
    """Memory format of a tensor.

    Args:
        tensor (Tensor[N, C, *]): Any layout.

    Returns:
        torch.memory_format: ``contiguous_format``, also for a tensor with
        gaps, unless all of its memory is channels_last and not contiguous
        as well.
    """
    if tensor.is_contiguous():
        return torch.contiguous_format
    last = _CHANNELS_LAST.get(tensor.dim())
    if last is None or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def as_memory_format(tensor, format):
    """Convert a tensor to a memory format, with unambiguous strides.

    The weight of a 1x1 convolution is contiguous and channels_last at once;
    from ambiguous strides torch concludes that it is contiguous.

    Args:
        tensor (Tensor[N, C, *]): Any layout.
        format (torch.memory_format): The format.

    Returns:
        Tensor[N, C, *]: The same values, in the same memory where possible.
    """
    tensor = tensor.contiguous(memory_format=format)
    if format == torch.contiguous_format:
        return tensor
    strides, step = [0] * tensor.dim(), 1
    for d in (1, *range(tensor.dim() - 1, 1, -1), 0):
        strides[d] = step
        step *= tensor.shape[d]
    return tensor.as_strided(tensor.shape, strides)
