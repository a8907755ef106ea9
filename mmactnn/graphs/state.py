"""State of modules that a captured graph rests on."""

import contextlib
from operator import is_

from torch import nn
from torch.nn.modules import module as global_hooks

# Hooks run code of the host at every call, which a replay does not.
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)


class ModuleState:
    """State of a module and its parts at one time.

    Python runs once, when a graph is captured, and what it read is part of
    the graph: whether a layer trains, a rate of dropout, the class of a
    layer, addresses of parameters. The state holds the objects themselves,
    so that no new one can have the identity of an old one.

    Args:
        module (nn.Module): The module.
        own_hooks (bool): Whether hooks of the module itself count.
    """

    def __init__(self, module, own_hooks):
        self._own_hooks = own_hooks
        self._parts = [
            (
                name,
                part,
                type(part),
                dict(vars(part)),
                [list(entries.values()) for entries in _entries(part)],
            )
            for name, part in module.named_modules()
        ]
        self._tensors = [
            (tensor, tensor.data_ptr(), tensor.requires_grad)
            for tensor in (*module.parameters(), *module.buffers())
        ]

    def holds(self):
        """Whether everything is as it was.

        Returns:
            bool: Of tensors their place counts and whether they need a
            gradient, not their values.
        """
        return (
            not global_hooks._has_any_global_hook()
            and all(
                type(part) is cls
                and not ((name or self._own_hooks) and _has_hooks(part))
                and _same(vars(part).values(), attributes.values())
                and all(
                    _same(now.values(), before)
                    for now, before in zip(_entries(part), entries)
                )
                for name, part, cls, attributes, entries in self._parts
            )
            and all(
                tensor.data_ptr() == place and tensor.requires_grad is needs
                for tensor, place, needs in self._tensors
            )
        )

    def find_change(self):
        """Name an attribute that has changed.

        Returns:
            str, optional: Qualified name of the attribute; None if there is
            none.
        """
        for name, part, _, attributes, _ in self._parts:
            now = vars(part)
            for key in {**attributes, **now}:
                if key not in now or now[key] is not attributes.get(key):
                    return f'{name}.{key}' if name else key
        return None


@contextlib.contextmanager
def leaves_replaced(module):
    """Give a module new leaves in place of its parameters, as a context.

    Nodes that accumulate gradients belong to the stream on which a leaf was
    used first. Those of a step before, which may still be alive, would tie
    the stream of a capture to others.

    Args:
        module (nn.Module): The module.

    Yields:
        dict[Tensor, Tensor]: Leaves by parameter, with the same memory.
    """
    leaves = {}
    originals = []
    for part in module.modules():
        entries = part._parameters
        for name, parameter in list(entries.items()):
            if type(parameter) is not nn.Parameter:
                continue
            if parameter not in leaves:
                leaves[parameter] = nn.Parameter(
                    parameter.detach(), parameter.requires_grad
                )
            originals.append((entries, name, parameter))
            entries[name] = leaves[parameter]
    try:
        yield leaves
    finally:
        for entries, name, parameter in originals:
            entries[name] = parameter


def find_hook(module, own_hooks):
    """Name a part with hooks, which would not run in replays.

    Args:
        module (nn.Module): The module.
        own_hooks (bool): Whether hooks of the module itself count. They run
            around its forward pass, and not around other methods.

    Returns:
        str, optional: Qualified name of the part; 'all modules' for global
        hooks, None if there are none.
    """
    if global_hooks._has_any_global_hook():
        return 'all modules'
    for name, part in module.named_modules():
        if (name or own_hooks) and _has_hooks(part):
            return name or 'it'
    return None


def _has_hooks(module):
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _entries(module):
    """Tensors and parts of a module, in dictionaries of their own."""
    return module._parameters, module._buffers, module._modules


def _same(now, before):
    # Both in the order in which they were set.
    return len(now) == len(before) and all(map(is_, now, before))
