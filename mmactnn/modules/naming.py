"""Qualified names of a model's modules, independent of wrappers."""

import torch.distributed as dist

# Attributes in which FullyShardedDataParallel, torch's wrapper for activation
# checkpointing and torch.compile keep the wrapped module.
_INNER = frozenset(
    ('_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod')
)

# Full names of wrapper classes whose only child ``module`` is the wrapped one.
# Their packages need not be installed.
_WRAPPERS = frozenset(
    (
        'torch.nn.parallel.data_parallel.DataParallel',
        'torch.nn.parallel.distributed.DistributedDataParallel',
        'torch.optim.swa_utils.AveragedModel',
        'mmengine.model.averaged_model.BaseAveragedModel',
        'deepspeed.runtime.engine.DeepSpeedEngine',
    )
)


def named_modules(model):
    """Iterate over the modules of a model, by their names without wrappers.

    Patterns of names, reports and saved states then mean the same whether
    parts of the model are wrapped or not.

    Args:
        model (nn.Module): The model.

    Yields:
        tuple[str, nn.Module]: Qualified name and module. A wrapper comes
        before the module that it wraps, with the same name.
    """
    # Maps names in the wrapped model to names without wrappers. Modules come
    # before their children.
    names = {'': ''}
    wrappers = set()
    for name, module in model.named_modules():
        if name:
            parent, _, last = name.rpartition('.')
            hidden = last in _INNER or (
                last == 'module' and parent in wrappers
            )
            parts = names[parent], '' if hidden else last
            names[name] = '.'.join(filter(None, parts))
        if _is_wrapper(module):
            wrappers.add(name)
        yield names[name], module


def _is_wrapper(module):
    return any(
        f'{cls.__module__}.{cls.__qualname__}' in _WRAPPERS
        for cls in type(module).__mro__
    )


def gathering_modules(model):
    """Modules for whose forward pass FSDP gathers parameters.

    Args:
        model (nn.Module): The model, with or without its own wrapper.

    Returns:
        list[nn.Module]: Such modules within the model and, as its own wrapper
        may not be known here, the model itself; empty without a process
        group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    return [model, *sharded_modules(model)]


def sharded_modules(model):
    """Modules whose parameters FSDP has sharded.

    Args:
        model (nn.Module): The model.

    Returns:
        list[nn.Module]: The modules without their wrappers.
    """
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    found = []
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            found.append(module.module)
        elif isinstance(module, FSDPModule):
            found.append(module)
    return found
