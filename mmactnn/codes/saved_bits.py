"""Random bits of a payload as tensors that autograd saves."""

import torch

from ..ops.random_bits import as_int64


def bits_to_tensors(drawn):
    """Tensors to save with the codes, from which the bits are read again.

    Args:
        drawn (DrawnBits): Random bits.

    Returns:
        tuple[Tensor]: Seed and offset (Tensor[2], int64, on the CPU, so that
        nothing waits for a device) and, if there is one, the offset tensor.
    """
    numbers = to_cpu([as_int64(drawn.seed), as_int64(drawn.offset)])
    if drawn.offset_tensor is None:
        return (numbers,)
    return numbers, drawn.offset_tensor


def split_saved(tensors, drawn):
    """Divide saved tensors of a payload into its own and its random bits.

    Args:
        tensors (Sequence[Tensor | None]): Tensors of a payload, followed by
            those of :func:`bits_to_tensors`.
        drawn (DrawnBits): Random bits of the call that saved them, which are
            replaced.

    Returns:
        tuple[Sequence[Tensor | None], DrawnBits]: Tensors of the payload, and
        the random bits that belong to them.
    """
    count = 1 if drawn.offset_tensor is None else 2
    numbers, *counter = tensors[-count:]
    seed, offset = numbers.tolist()
    drawn = drawn._replace(
        seed=seed, offset=offset, offset_tensor=counter[0] if counter else None
    )
    return tensors[:-count], drawn


def to_cpu(numbers):
    """Make a tensor of integers on the CPU, whatever the default device.

    Args:
        numbers (Sequence[int]): Signed, of 64 bits.

    Returns:
        Tensor[*]: int64.
    """
    return torch.tensor(numbers, dtype=torch.int64, device='cpu')
