"""All checks of torch.library for an op."""

import torch
from torch.utils import _pytree


def opcheck(op, arguments):
    """Run them with tensors that require no gradient, most with such that do.

    Args:
        op (torch._ops.OpOverload): The op.
        arguments (tuple): What it is called with.
    """

    def require_grad(tensor):
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().clone().requires_grad_()

    torch.library.opcheck(op, arguments)
    # Compilation, which takes long, has seen the op.
    torch.library.opcheck(
        op,
        _pytree.tree_map_only(torch.Tensor, require_grad, arguments),
        test_utils=(
            'test_schema',
            'test_autograd_registration',
            'test_faketensor',
        ),
    )
