"""Names for configs, in MMEngine's root registries and in our own.

Once ``mmactnn`` is imported, ``type='QConv2d'`` resolves under every default
scope by the root registries; ``type='mmactnn.QConv2d'`` resolves by the child
registries without any import.
"""

import importlib.metadata
import pkgutil

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

from ..registry import ADAPTER_NAMES, default_registry

MODELS = Registry(
    'model', parent=ROOT_MODELS, scope='mmactnn', locations=['mmactnn.layers']
)
HOOKS = Registry(
    'hook', parent=ROOT_HOOKS, scope='mmactnn', locations=['mmactnn.hooks']
)


def _builder(path):
    """Make a function that imports a class when it is built."""

    def build(*args, **kwargs):
        return pkgutil.resolve_name(path)(*args, **kwargs)

    build.__name__ = build.__qualname__ = path.split(':')[-1]
    return build


def _register_layer(entry):
    """Register a compressed layer for configs."""
    for registry in (ROOT_MODELS, MODELS):
        registry.register_module(name=list(entry.names), module=entry.layer)


default_registry.subscribe(_register_layer)
for _registry in (ROOT_MODELS, MODELS):
    for _name, _path in ADAPTER_NAMES.items():
        _registry.register_module(name=_name, module=_builder(_path))


def register_hook(cls):
    """Register a hook's class in place of the function that builds it.

    Args:
        cls (type): The hook.
    """
    for registry in (ROOT_HOOKS, HOOKS):
        registry.register_module(cls.__name__, force=True, module=cls)


# Hooks import most of MMEngine, which may be only partly imported now.
for _registry in (ROOT_HOOKS, HOOKS):
    _registry.register_module(
        'ActNNHook', module=_builder('mmactnn.hooks:ActNNHook')
    )


def _name_packages():
    """Make ``_base_ = 'mmactnn::...'`` and ``'mmseg::...'`` resolve.

    MMEngine finds configs by names of distributions, in a fixed table. It has
    no entry for this package, and the one for MMSegmentation is wrong for
    distributions of other names (``onedl-mmsegmentation``).
    """
    MODULE2PACKAGE.setdefault('mmactnn', 'mmactnn')
    try:
        importlib.metadata.distribution(MODULE2PACKAGE['mmseg'])
    except importlib.metadata.PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'


_name_packages()
