"""Dtypes to which autocast casts the inputs of an operation."""

import torch


def lower_dtype(input):
    """The dtype in which autocast runs convolutions and matrix products.

    Args:
        input (Tensor[*]): Input of the operation.

    Returns:
        torch.dtype, optional: None where autocast is off; it leaves float64
        alone.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def cast(dtype, *tensors):
    """Tensors in another dtype.

    Args:
        dtype (torch.dtype, optional): None leaves them as they are.
        *tensors (Tensor, optional): Tensors to cast.

    Returns:
        Sequence[Tensor | None]: The cast tensors, in the same order.
    """
    if dtype is None:
        return tensors
    return [None if t is None else t.to(dtype) for t in tensors]


def full_dtype(input):
    """The dtype in which autocast runs normalisation over a group.

    Args:
        input (Tensor[*]): Input of the operation.

    Returns:
        torch.dtype, optional: float32 on CUDA; None where autocast is off,
        for float64 and on the CPU, whose autocast leaves it alone.
    """
    casts = (
        input.is_cuda
        and torch.is_autocast_enabled('cuda')
        and input.dtype != torch.float64
    )
    return torch.float32 if casts else None
