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

from ..registry import ADAPTER_NAMES, default_registry

MODELS = Registry(
    'model', parent=ROOT_MODELS, scope='mmactnn', locations=['mmactnn.layers']
)
HOOKS = Registry(
    'hook', parent=ROOT_HOOKS, scope='mmactnn', locations=['mmactnn.hooks']
)


def _builder(path):
    """What builds a class that is not to be imported before."""

    def build(*args, **kwargs):
        return pkgutil.resolve_name(path)(*args, **kwargs)

    build.__name__ = build.__qualname__ = path.split(':')[-1]
    return build


def _register_layer(entry):
    """Let configs name a compressed layer."""
    for registry in (ROOT_MODELS, MODELS):
        registry.register_module(name=list(entry.names), module=entry.layer)


default_registry.subscribe(_register_layer)
for _registry in (ROOT_MODELS, MODELS):
    for _name, _path in ADAPTER_NAMES.items():
        _registry.register_module(name=_name, module=_builder(_path))


def register_hook(cls):
    """Make a hook's own class known, in place of what builds it.

    Args:
        cls (type): The hook.
    """
    for registry in (ROOT_HOOKS, HOOKS):
        registry.register_module(cls.__name__, force=True, module=cls)


# Hooks import most of MMEngine, which may be half imported now.
for _registry in (ROOT_HOOKS, HOOKS):
    _registry.register_module(
        'ActNNHook', module=_builder('mmactnn.hooks:ActNNHook')
    )


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
