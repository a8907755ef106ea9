"""All checks of torch.library for an op."""

import torch
from torch.utils import _pytree


def opcheck(op, arguments):
    """Run them with tensors that require no gradient, and with such that do.

    Args:
        op (torch._ops.OpOverload): The op.
        arguments (tuple): What it is called with.
    """

    def require_grad(tensor):
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().clone().requires_grad_()

    torch.library.opcheck(op, arguments)
    torch.library.opcheck(
        op, _pytree.tree_map_only(torch.Tensor, require_grad, arguments)
    )
