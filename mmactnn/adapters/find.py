"""Finds what of a model has a layered counterpart."""

import pkgutil
from typing import NamedTuple

from torch import nn

from ..modules.naming import named_modules

_DETECTION = 'mmactnn.adapters.detection'

# By full name, so that MMDetection need not be imported, nor installed. Exact
# types only: a subclass may compute something else.
COUNTERPARTS = {
    'mmdet.models.necks.fpn.FPN': f'{_DETECTION}:QFPN',
    'mmdet.models.dense_heads.rpn_head.RPNHead': f'{_DETECTION}:QRPNHead',
    'mmdet.models.layers.se_layer.ChannelAttention': (
        f'{_DETECTION}:QChannelAttention'
    ),
    'mmdet.models.layers.se_layer.SELayer': f'{_DETECTION}:QSELayer',
}

# What configs may name.
MODEL_NAMES = {
    'QFPN': f'{_DETECTION}:QFPN',
    'QRPNHead': f'{_DETECTION}:QRPNHead',
}


class LayeredPlan(NamedTuple):
    """A module that is to call layers in place of functions.

    Attributes:
        name (str): Qualified name in the model.
        module (nn.Module): The module, as it is.
        target (type): What it becomes: a ``LayeredModule``.
        layers (dict[str, nn.Module]): The layers, plain ones, by their names
            in the module.
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
        """Let the module call its layers."""
        for layer in self.layers.values():
            layer.train(self.module.training)
        self.target.convert_(self.module, self.layers)


def find_layered(model):
    """What of a model can call layers in place of functions.

    Args:
        model (nn.Module): The model, which stays as it is.

    Returns:
        dict[nn.Module, LayeredPlan]: By the module; none for those that call
        layers already.
    """
    plans = {}
    for name, module in named_modules(model):
        cls = type(module)
        path = COUNTERPARTS.get(f'{cls.__module__}.{cls.__qualname__}')
        if path is None:
            continue
        target = pkgutil.resolve_name(path)
        layers = target.make_layers(module)
        if layers:
            plain = {key: layer.to_float() for key, layer in layers.items()}
            plans[module] = LayeredPlan(name, module, target, plain)
    return plans
