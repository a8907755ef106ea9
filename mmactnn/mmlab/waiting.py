"""Registration of names as soon as MMEngine is imported, and not before.

Importing :mod:`mmactnn` must not import MMEngine, which takes seconds and may
not be needed.
"""

import sys
import warnings

# Modules of MMEngine that registration needs. The package itself may be partly
# imported then: its optimizers import transformers, which may import anything.
_AWAITED = 'mmengine.registry'


class _Waiting:
    """Finder of ``sys.meta_path`` that finds nothing, but observes imports.

    It removes itself when the names are registered.
    """

    def find_spec(self, name, path=None, target=None):
        """See ``importlib.abc.MetaPathFinder``."""
        if name != _AWAITED:
            if _is_loaded():
                self.finish()
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, 'find_spec', None)
            if isinstance(finder, _Waiting) or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    def finish(self):
        """Register the names."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            _register()
        except Exception as error:
            # An error here must not break the import of MMEngine.
            warnings.warn(
                'mmactnn cannot register its layers and its hook with '
                f'MMEngine: {type(error).__name__}: {error}',
                stacklevel=2,
            )

    def _watch(self, loader):
        """Call :meth:`finish` after a loader has loaded its module.

        The loader's method is replaced for one call only.
        """
        try:
            execute = loader.exec_module

            def exec_module(module):
                vars(loader).pop('exec_module', None)
                execute(module)
                self.finish()

            loader.exec_module = exec_module
        except AttributeError:
            pass  # A later import will find the module loaded.


def register_when_loaded():
    """Register the names now if MMEngine is loaded, else once it is."""
    if _is_loaded():
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _is_loaded():
    module = sys.modules.get(_AWAITED)
    spec = getattr(module, '__spec__', None)
    return module is not None and not getattr(spec, '_initializing', False)


def _register():
    from . import registry  # noqa: F401  (registers when it is imported)
