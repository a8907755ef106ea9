"""Registry of compressed layers.

MMEngine imports this module for types of the scope ``mmactnn``; its own
registries of the package are attributes, so that MMEngine is imported by
those alone who have it.
"""


def __getattr__(name):
    if name in ('MODELS', 'HOOKS'):
        from .mmlab import registry

        return getattr(registry, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
