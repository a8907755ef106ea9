"""Tensors that have a shape, but no values."""

import torch


def counted(shape, dtype):
    """A tensor for the meter to count: what torch would have kept.

    Args:
        shape (Sequence[int]): Its shape.
        dtype (torch.dtype): Its dtype.

    Returns:
        Tensor[*]: On the meta device, without memory.
    """
    return torch.empty(shape, dtype=dtype, device='meta')


def hollow(shape, like, channels_last):
    """A tensor for ops that use nothing but the shape of an argument.

    On CUDA it has no memory, and is contiguous: an expanded tensor would be
    copied into one of full size by ops that ask for ``contiguous()``, and
    would not tell its memory format. On the CPU it has memory that nobody has
    written to, which costs nothing: there ops may convert the layout of all
    their arguments, and so read them.

    Args:
        shape (Sequence[int]): Its shape.
        like (Tensor[*]): Tells dtype and device.
        channels_last (bool): Whether it is channels_last.

    Returns:
        Tensor[*]: Of no values that mean anything.
    """
    stand_in = torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last
        if channels_last
        else torch.contiguous_format,
    )
    if like.is_cuda:
        stand_in.untyped_storage().resize_(0)
    return stand_in
