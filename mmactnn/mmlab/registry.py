"""Names for configs, in MMEngine's root registries and in our own.

Root names resolve as plain ``type='QConv2d'`` under every default scope once
``mmactnn`` is imported; those of the child registries as
``type='mmactnn.QConv2d'`` without any import.
"""

import importlib.metadata
import pkgutil
import warnings

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

from ..registry import ConfigNames, default_registry

MODELS = Registry(
    'model', parent=ROOT_MODELS, scope='mmactnn', locations=['mmactnn.layers']
)
HOOKS = Registry(
    'hook', parent=ROOT_HOOKS, scope='mmactnn', locations=['mmactnn.hooks']
)


def _builder(path):
    """Builder of a class that is not to be imported before."""

    def build(*args, **kwargs):
        return pkgutil.resolve_name(path)(*args, **kwargs)

    build.__name__ = build.__qualname__ = path.split(':')[-1]
    build.is_of_mmactnn = True
    return build


class _Names(ConfigNames):
    """Names in MMEngine's root registry and in our own."""

    def holder(self, name):
        """See the base class."""
        found = ROOT_MODELS.module_dict.get(name)
        # A class takes the place of what would have imported it.
        return None if hasattr(found, 'is_of_mmactnn') else found

    def add(self, names, cls):
        """See the base class."""
        for registry in (ROOT_MODELS, MODELS):
            registry.register_module(list(names), force=True, module=cls)

    def add_lazily(self, name, path):
        """See the base class."""
        self.add([name], _builder(path))


_clashes = default_registry.subscribe(_Names())
if _clashes:
    warnings.warn(
        f"MMEngine's registry has names of ours: {'; '.join(_clashes)}",
        stacklevel=2,
    )


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
