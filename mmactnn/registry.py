"""Names for configs, in MMEngine's root registries and in our own.

Root names resolve as plain ``type='QConv2d'`` under every default scope once
``mmactnn`` is imported; those of the child registries as
``type='mmactnn.QConv2d'`` without any import.
"""

import importlib.metadata
import pkgutil

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

from .layers import (
    QAdaptiveAvgPool2d,
    QAvgPool2d,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QDropout,
    QGroupNorm,
    QLeakyReLU,
    QLinear,
    QMaxPool2d,
    QReLU,
    QReLU6,
    QSiLU,
    QSyncBatchNorm,
    QuantizedLayer,
)
from .models import MODEL_NAMES

MODELS = Registry(
    'model', parent=ROOT_MODELS, scope='mmactnn', locations=['mmactnn.layers']
)
HOOKS = Registry(
    'hook', parent=ROOT_HOOKS, scope='mmactnn', locations=['mmactnn.hooks']
)

# Class names first, then the short names in MMCV's manner.
LAYER_NAMES = {
    QConv1d: ('QConv1d',),
    QConv2d: ('QConv2d', 'QConv'),
    QConv3d: ('QConv3d',),
    QConvTranspose1d: ('QConvTranspose1d',),
    QConvTranspose2d: ('QConvTranspose2d',),
    QConvTranspose3d: ('QConvTranspose3d',),
    QLinear: ('QLinear',),
    QBatchNorm1d: ('QBatchNorm1d', 'QBN1d'),
    QBatchNorm2d: ('QBatchNorm2d', 'QBN2d', 'QBN'),
    QBatchNorm3d: ('QBatchNorm3d', 'QBN3d'),
    QGroupNorm: ('QGroupNorm', 'QGN'),
    QSyncBatchNorm: ('QSyncBatchNorm', 'QSyncBN'),
    QReLU: ('QReLU',),
    QReLU6: ('QReLU6',),
    QSiLU: ('QSiLU',),
    QLeakyReLU: ('QLeakyReLU',),
    QMaxPool2d: ('QMaxPool2d',),
    QAvgPool2d: ('QAvgPool2d',),
    QAdaptiveAvgPool2d: ('QAdaptiveAvgPool2d',),
    QDropout: ('QDropout',),
}


def _builder(path):
    """What builds a class that is not to be imported before."""

    def build(*args, **kwargs):
        return pkgutil.resolve_name(path)(*args, **kwargs)

    return build


for _registry in (ROOT_MODELS, MODELS):
    for _layer, _names in LAYER_NAMES.items():
        _registry.register_module(name=list(_names), module=_layer)
    for _name, _path in MODEL_NAMES.items():
        _registry.register_module(name=_name, module=_builder(_path))

_TYPE_NAMES = {name for names in LAYER_NAMES.values() for name in names}
_TYPE_NAMES.update(MODEL_NAMES)


def require_named_layers(model, config, include, exclude):
    """Raise if a config names compressed layers and its model has none.

    Args:
        model (nn.Module): The model, after its conversion.
        config (dict, optional): Config of the model.
        include (list[str], optional): Filter of the conversion, for the
            message.
        exclude (list[str]): Likewise.

    Raises:
        RuntimeError: If that is so.
    """
    named = _named_types(config)
    if named and not any(
        isinstance(m, QuantizedLayer) for m in model.modules()
    ):
        raise RuntimeError(
            f'the config names {", ".join(sorted(named))}, but no layer '
            'of the model is compressed: something has turned them back '
            'into plain layers, and include/exclude of ActNNHook keep '
            f'them so (include={include}, exclude={exclude})'
        )


def _named_types(config):
    """The compressed layer types that a model's config names."""
    if isinstance(config, dict):
        name = config.get('type')
        found = set()
        if isinstance(name, str) and name.split('.')[-1] in _TYPE_NAMES:
            found.add(name)
        return found.union(*(_named_types(v) for v in config.values()))
    if isinstance(config, (list, tuple)):
        return set().union(*(_named_types(item) for item in config))
    return set()


def _name_packages():
    """Make ``_base_ = 'mmactnn::...'`` and ``'mmseg::...'`` resolve.

    MMEngine looks configs up by the names of distributions in a fixed table.
    It has no entry for this package, and one for MMSegmentation that does
    not hold for distributions of other names (``onedl-mmsegmentation``).
    """
    MODULE2PACKAGE.setdefault('mmactnn', 'mmactnn')
    try:
        importlib.metadata.distribution(MODULE2PACKAGE['mmseg'])
    except importlib.metadata.PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'


_name_packages()

from . import hooks  # noqa: E402,F401  (registers itself in HOOKS)
