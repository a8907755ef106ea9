"""Layers that may overwrite their input."""

from .. import ops


def may_overwrite(input, inplace):
    """Whether a kernel writes its output over its input.

    Args:
        input (Tensor[*]): The input.
        inplace (bool): Whether the layer works in place.

    Returns:
        bool: False also for an input with gaps in memory: the kernels want
        none.
    """
    return inplace and ops.layout.is_dense(input)


def finish(ctx, input, output, inplace):
    """Put the output of a kernel where it belongs.

    Args:
        ctx (FunctionCtx): Learns that the input was overwritten.
        input (Tensor[*]): The input.
        output (Tensor[*]): What the kernel returned, maybe ``input``.
        inplace (bool): Whether the layer works in place.

    Returns:
        Tensor[*]: The layer's output: ``input`` in place, else ``output``.
    """
    if not inplace:
        return output
    ctx.mark_dirty(input)
    return input if output is input else input.copy_(output)
