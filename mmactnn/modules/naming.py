"""Parts of a model that torch has wrapped."""

import torch.distributed as dist

# Where FullyShardedDataParallel and torch's wrapper for activation
# checkpointing keep what they wrap.
_INNER = frozenset(('_fsdp_wrapped_module', '_checkpoint_wrapped_module'))


def named_modules(model):
    """The modules of a model, by the names that they have unwrapped.

    Patterns of names, reports and saved states then mean the same whether
    parts of the model are wrapped or not.

    Args:
        model (nn.Module): The model.

    Yields:
        tuple[str, nn.Module]: Qualified name and module. A wrapper comes
        before what it wraps, by the same name.
    """
    for name, module in model.named_modules():
        yield '.'.join(p for p in name.split('.') if p not in _INNER), module


def gathering_modules(model):
    """Modules before whose forward pass FSDP gathers parameters.

    Args:
        model (nn.Module): The model, with or without its own wrapper.

    Returns:
        list[nn.Module]: Those of the model's parts and, as its wrapper may be
        out of sight, the model. None without a process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    found = [model]
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            found.append(module.module)
        elif isinstance(module, FSDPModule):
            found.append(module)
    return found
