"""Saved-tensor hooks in force, as far as payloads depend on them."""

import torch

# Called with True; None if there are none, else the pair that saved tensors
# go through.
top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def keep_tensors():
    """Whether the backward pass gets the tensors that are saved now.

    Not in a checkpointed block (``torch.utils.checkpoint`` without
    reentrance): there the tensors of a second forward pass take the place of
    those of the first one, but all else that a node keeps stays as it was.
    Random bits of the first pass would not be those of such codes, and
    therefore have to be saved beside them.

    Returns:
        bool: False under hooks whose first function has no attribute
        ``keeps_tensors`` that is True.
    """
    hooks = top_hooks(True)
    return hooks is None or getattr(hooks[0], 'keeps_tensors', False)


def meter_in_force():
    """Find the meter that saved tensors are reported to.

    Returns:
        ActivationMeter, optional: The attribute ``meter`` of the object whose
        method is the first of the hooks in force; None if there is none, as
        within a checkpointed block.
    """
    hooks = top_hooks(True)
    if hooks is None:
        return None
    return getattr(getattr(hooks[0], '__self__', None), 'meter', None)
