"""All checks of torch.library for an op."""

import torch
from torch.utils import _pytree

_QUICK = 'test_schema', 'test_autograd_registration', 'test_faketensor'

_compiled = set()


def opcheck(op, arguments):
    """Run them with tensors that require no gradient, most with such that do.

    The one that compiles takes nearly all of the time, and sees what an op
    does to its arguments, whichever these are: it runs once for an op.

    Args:
        op (torch._ops.OpOverload): The op.
        arguments (tuple): What it is called with.
    """

    def require_grad(tensor):
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().clone().requires_grad_()

    devices = {
        t.device.type
        for t in _pytree.tree_leaves(arguments)
        if isinstance(t, torch.Tensor)
    }
    key = op, *devices
    more = () if key in _compiled else ('test_aot_dispatch_dynamic',)
    _compiled.add(key)
    torch.library.opcheck(op, arguments, test_utils=(*_QUICK, *more))
    torch.library.opcheck(
        op,
        _pytree.tree_map_only(torch.Tensor, require_grad, arguments),
        test_utils=_QUICK,
    )
