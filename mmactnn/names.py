"""Names of compressed layers in configs."""

from .adapters import Adapter
from .layers import QuantizedLayer
from .registry import default_registry


def require_named_layers(model, config, include, exclude):
    """Raise if a config names compressed layers and its model has none.

    Args:
        model (nn.Module): The model, after its conversion.
        config (dict, optional): Config of the model.
        include (list[str], optional): Filter of the conversion, for the
            message.
        exclude (list[str]): Likewise.

    Raises:
        RuntimeError: If none of the named layers is left in the model.
    """
    named = _named_types(config, default_registry.config_names)
    if named and not any(
        isinstance(m, QuantizedLayer) for m in model.modules()
    ):
        raise RuntimeError(
            f'the config names {", ".join(sorted(named))}, but no layer '
            'of the model is compressed: something has turned them back '
            'into plain layers, and include/exclude of ActNNHook keep '
            f'them so (include={include}, exclude={exclude})'
        )


def _named_types(config, known):
    """The compressed layer types that a model's config names."""
    if isinstance(config, dict):
        name = _name_of(config.get('type'))
        found = set()
        if name is not None and name.split('.')[-1] in known:
            found.add(name)
        return found.union(*(_named_types(v, known) for v in config.values()))
    if isinstance(config, (list, tuple)):
        return set().union(*(_named_types(item, known) for item in config))
    return set()


def _name_of(kind):
    """Name of a type in a config: text, a class, or one that is not built."""
    if isinstance(kind, type):
        ours = issubclass(kind, (QuantizedLayer, Adapter))
        return kind.__name__ if ours else None
    # MMEngine's lazy objects tell their names as text.
    return None if kind is None else str(kind)
