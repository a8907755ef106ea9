"""Memory layouts that kernels read in place, and copies of others."""

import torch


def is_dense(tensor):
    """Whether the elements fill one piece of memory, in whatever order."""
    # Cheap checks first: every layer calls this in every step.
    return (
        tensor.is_contiguous()
        or tensor.is_contiguous(memory_format=torch.channels_last)
        or torch.ops.aten.is_non_overlapping_and_dense(tensor)
    )


def dense(tensor):
    """The tensor itself if it is dense, else a contiguous copy."""
    return tensor if is_dense(tensor) else tensor.contiguous()


def dense_rows(tensor):
    """A dense tensor whose samples (dimension 0) lie one after another.

    Contiguous and channels_last tensors, and any permutation of the inner
    dimensions, pass without a copy.
    """
    if tensor.is_contiguous():
        return tensor
    rows = tensor.size(0)
    if is_dense(tensor) and (
        rows <= 1 or tensor.stride(0) == tensor.numel() // rows
    ):
        return tensor
    return tensor.contiguous()


def dense_channels(tensor):
    """A tensor [N, C, *] that is contiguous or dense and channels_last.

    Such tensors pass without a copy. The copy of another layout is
    channels_last if its strides suggest that.

    Args:
        tensor (Tensor[N, C, *]): Of 2 to 5 dimensions, any layout.
    """
    if tensor.is_contiguous() or tensor.is_contiguous(
        memory_format=torch.channels_last
    ):
        return tensor
    inner = tensor.movedim(1, -1)
    if inner.is_contiguous():
        return tensor
    if suggests_channels_last(tensor):
        return inner.contiguous().movedim(-1, 1)
    return tensor.contiguous()


def suggests_channels_last(tensor):
    """Whether torch takes a tensor for channels_last, dense or not.

    Outputs of pooling and convolution have the layout that the strides of
    the input suggest. This function equals ``is_channels_last_strides_2d_s4``
    of torch's c10/core/MemoryFormat.h.

    Args:
        tensor (Tensor[*]): Any shape and layout.
    """
    if tensor.dim() != 4 or tensor.numel() == 0 or tensor.stride(1) == 0:
        return False
    expected = 0
    for d in (1, 3, 2, 0):
        size, stride = tensor.size(d), tensor.stride(d)
        # A sample as large as a channel fits both layouts: contiguous.
        if stride < expected or (d == 0 and expected == tensor.stride(1)):
            return False
        expected = stride * size
    return True


def with_strides(tensor, stride):
    """A tensor of given strides; a copy only if they differ.

    Args:
        tensor (Tensor[*]): Any layout.
        stride (tuple[int]): Strides of a dense layout of the same shape.

    Returns:
        Tensor[*]: The same values. Strides of dimensions of size 1 are
        ignored.
    """
    strides = tensor.stride()
    same = strides == stride or all(
        have == want or size == 1
        for size, have, want in zip(tensor.shape, strides, stride)
    )
    if same or tensor.numel() == 0:
        return tensor
    out = torch.empty_strided(
        tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
    )
    return out.copy_(tensor)
