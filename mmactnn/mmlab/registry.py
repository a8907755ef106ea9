"""Names for configs, in MMEngine's root registries and in our own.

Once ``mmactnn`` is imported, ``type='QConv2d'`` resolves under every default
scope by the root registries; ``type='mmactnn.QConv2d'`` resolves by the child
registries without any import.
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
    """Make a function that imports a class when it is built."""

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
        # A class replaces the builder that would have imported it.
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
