"""Classes of modules that call functions in a scope."""

import torch
from torch import nn

from ..layers import QuantizedLayer
from ..modules.class_swap import WithForward, replace_class, wrapped_class
from ..modules.functions import find_static
from ..registry import default_registry
from .scope import call_in_scope

# Modules of torch with functions of their own are below this package.
_TORCH_MODULES = 'torch.nn.modules.'


class ScopedModule(WithForward):
    """Mixin of the classes of modules whose functions are compressed.

    Their forward pass is the parent's, in a scope.
    """

    @staticmethod
    def run_forward(cls, module, *args, **kwargs):
        """See the base class."""
        return call_in_scope(module, cls.forward, (module, *args), kwargs)


def calls_functions(module):
    """Whether a module has a forward pass that may call functions of torch.

    Args:
        module (nn.Module): The module.

    Returns:
        bool: False for layers that are or could be converted, containers,
        wrappers, scripted modules, and modules whose forward pass was
        replaced on the instance.
    """
    if (
        isinstance(module, (QuantizedLayer, torch.jit.ScriptModule))
        or 'forward' in module.__dict__
        or default_registry.find_layer(module)[0] is not None
    ):
        return False
    forward = find_static(type(module), 'forward')
    home = getattr(forward, '__module__', None)
    if home is None or forward in (nn.Module.forward, nn.Sequential.forward):
        return False
    if home.partition('.')[0] != 'torch':
        return True
    # Such as nn.TransformerEncoderLayer.
    return home.startswith(_TORCH_MODULES) and bool(module._modules)


def set_scope(module, settings, swaps=True):
    """Compress the functions that a module calls, in place.

    Args:
        module (nn.Module): The module, not in a scope yet.
        settings (FunctionSettings, optional): Settings of its functions; None
            leaves them to torch, though modules around it may have settings.
        swaps (bool, optional): Whether its class gets a forward pass that
            enters the scope; False for classes that do it themselves.
            Defaults to True.
    """
    # Bypasses the checks of nn.Module.__setattr__.
    module.__dict__['_functions'] = settings
    if swaps:
        plain = wrapped_class(type(module))
        replace_class(module, plain, ScopedModule.of(plain))


def remove_scopes(model):
    """Undo :func:`set_scope` for all parts of a model.

    Args:
        model (nn.Module): The model.

    Returns:
        list[nn.Module]: Modules whose class was another one.
    """
    found = []
    for module in model.modules():
        module.__dict__.pop('_functions', None)
        if isinstance(module, ScopedModule):
            scoped = wrapped_class(type(module))
            replace_class(module, scoped, scoped.plain_class)
            found.append(module)
    return found


def unscoped_class(module):
    """The class of a module without scopes.

    Args:
        module (nn.Module): The module.

    Returns:
        type: Its class before :func:`set_scope`.
    """
    if isinstance(module, ScopedModule):
        return module.plain_class
    return type(module)


def settings_of(module):
    """Settings of the functions that a module calls.

    Args:
        module (nn.Module): The module.

    Returns:
        FunctionSettings, optional: None if it calls torch's.
    """
    return module.__dict__.get('_functions')
