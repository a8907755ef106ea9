"""Search for the modules of a model that have an adapter."""

from typing import NamedTuple

from torch import nn

from ..modules.naming import named_modules
from ..registry import default_registry
from .base import Adapter


class AdapterPlan(NamedTuple):
    """Plan to adapt a module.

    Attributes:
        name (str): Qualified name in the model.
        module (nn.Module): The module, not yet adapted.
        target (type): The adapter.
        layers (dict[str, nn.Module]): New layers of the module, plain ones,
            by their names in the module.
    """

    name: str
    module: nn.Module
    target: type
    layers: dict

    @property
    def named_layers(self):
        """dict[str, nn.Module]: The layers by their names in the model."""
        prefix = f'{self.name}.' if self.name else ''
        return {prefix + key: layer for key, layer in self.layers.items()}

    def install(self):
        """Adapt the module."""
        for layer in self.layers.values():
            layer.train(self.module.training)
        self.target.convert_(self.module, self.layers)


class FoundAdapters(NamedTuple):
    """Result of a search.

    Attributes:
        plans (dict[nn.Module, AdapterPlan]): Plans by module; modules that
            are adapted already have none.
        refused (dict[str, tuple[nn.Module, str]]): Modules whose adapter was
            written for another forward pass, with the reason, by qualified
            name.
    """

    plans: dict
    refused: dict


def find_adapters(model, registry=default_registry):
    """Find the modules of a model that can be adapted.

    Args:
        model (nn.Module): The model, which is not changed.
        registry (Registry, optional): Registry of the adapters. Defaults to
            that of the package.

    Returns:
        FoundAdapters: The modules.
    """
    plans, refused = {}, {}
    for name, module in named_modules(model):
        if isinstance(module, Adapter) or 'forward' in vars(module):
            continue
        entry = registry.find_adapter(type(module))
        if entry is None:
            continue
        target = entry.adapter
        if not target.matches_source(entry.fingerprints):
            refused[name] = (
                module,
                'its forward pass is not the one that the adapter '
                f'{target.__name__} was written for',
            )
            continue
        layers = {
            key: layer.to_float()
            for key, layer in target.make_layers(module).items()
        }
        plans[module] = AdapterPlan(name, module, target, layers)
    return FoundAdapters(plans, refused)
