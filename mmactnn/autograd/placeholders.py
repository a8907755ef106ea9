"""Placeholder tensors: a shape without values."""

import torch


def meta_tensor(shape, dtype):
    """A tensor on the meta device.

    It stands for a tensor that torch would have kept, for the meter to count.

    Args:
        shape (Sequence[int]): Its shape.
        dtype (torch.dtype): Its dtype.

    Returns:
        Tensor[*]: The tensor, without memory.
    """
    return torch.empty(shape, dtype=dtype, device='meta')


def placeholder_like(shape, like, channels_last):
    """An argument for ops that only use its shape.

    On CUDA it has no memory, and is contiguous: ops that ask for
    ``contiguous()`` would copy an expanded tensor into one of full size, and
    could not tell its memory format. On the CPU it has memory that has never
    been written to, which costs nothing: there ops may convert the layout of
    all their arguments, and so read them.

    Args:
        shape (Sequence[int]): Its shape.
        like (Tensor[*]): Tensor of the same dtype and device.
        channels_last (bool): Whether it is channels_last.

    Returns:
        Tensor[*]: The tensor; its values are undefined.
    """
    placeholder = torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last
        if channels_last
        else torch.contiguous_format,
    )
    if like.is_cuda:
        placeholder.untyped_storage().resize_(0)
    return placeholder
