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
