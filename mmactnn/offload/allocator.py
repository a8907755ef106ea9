"""Settings of torch's CUDA allocator."""

import os

import torch

# In the order in which torch reads them; the second is the older name.
_VARIABLES = ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')


def require_expandable_segments():
    """Check that the CUDA allocator uses expandable segments.

    The allocator reads its settings once, when a process starts to use the
    GPU. From then on this function checks the settings in force, before that
    the environment.

    Raises:
        RuntimeError: If there is no GPU, or the allocator keeps segments of
            fixed sizes.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            'expandable segments belong to the CUDA allocator, but no CUDA '
            'device is available; choose a level that needs none, such as '
            "'L3'"
        )
    backend = torch.cuda.get_allocator_backend()
    if backend != 'native':
        raise RuntimeError(
            'expandable segments belong to the native CUDA allocator, but '
            f'the backend is {backend!r}; remove "backend:" from '
            f'{_VARIABLES[0]} (or {_VARIABLES[1]})'
        )
    if torch.cuda.is_initialized():
        enabled, where = _in_force(), 'the allocator runs without them'
    else:
        enabled, where = _in_environment()
    if not enabled:
        raise RuntimeError(
            f'expandable segments are needed, but {where}. Set '
            f'{_VARIABLES[0]}=expandable_segments:True (older torch: '
            f'{_VARIABLES[1]}) in the environment before the process '
            'starts. Buffers of many sizes come and go in compressed '
            'training; segments of fixed sizes fragment, so that much more '
            'memory is reserved than allocated'
        )


def _in_force():
    settings = torch.cuda.memory._snapshot()['allocator_settings']
    return bool(settings['expandable_segments'])


def _in_environment():
    """Whether the environment enables them, and the value of its variable."""
    for name in _VARIABLES:
        value = os.environ.get(name)
        if value:
            options = [option.strip() for option in value.split(',')]
            pairs = [option.partition(':') for option in options]
            # The last of several values applies.
            chosen = [
                setting.strip()
                for key, _, setting in pairs
                if key.strip() == 'expandable_segments'
            ]
            return chosen[-1:] == ['True'], f'{name} is {value!r}'
    return False, f'neither {" nor ".join(_VARIABLES)} is set'
