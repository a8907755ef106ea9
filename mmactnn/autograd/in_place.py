"""In-place operation of layers."""

from .. import ops


def may_overwrite(input, inplace):
    """Whether a kernel writes its output over its input.

    Args:
        input (Tensor[*]): The input.
        inplace (bool): Whether the layer works in place.

    Returns:
        bool: False also for an input with gaps in memory, which kernels do
        not take.
    """
    return inplace and ops.layout.is_dense(input)


def finish(ctx, input, output, inplace):
    """Return the output of a kernel from a layer that may work in place.

    Args:
        ctx (FunctionCtx): Context, where an overwritten input is marked.
        input (Tensor[*]): The input.
        output (Tensor[*]): Output of the kernel, which may be ``input``.
        inplace (bool): Whether the layer works in place.

    Returns:
        Tensor[*]: The layer's output: ``input`` in place, else ``output``.
    """
    if not inplace:
        return output
    ctx.mark_dirty(input)
    return input if output is input else input.copy_(output)
