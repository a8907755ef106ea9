"""Per-channel arithmetic of normalisation layers."""


def channel_shape(tensor):
    """Shape that lets a vector of channels broadcast.

    Args:
        tensor (Tensor[N, C, *]): What it meets.

    Returns:
        list[int]: ``[1, -1, 1, ...]``.
    """
    return [1, -1] + [1] * (tensor.dim() - 2)


def dims_but_channels(tensor):
    """The dimensions that a statistic of each channel runs over.

    Args:
        tensor (Tensor[N, C, *]): What it is of.

    Returns:
        list[int]: All dimensions but 1.
    """
    return [d for d in range(tensor.dim()) if d != 1]
