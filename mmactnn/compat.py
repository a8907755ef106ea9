"""Compatibility with ActNN's API and with tools that check exact types."""

import contextlib

from .config import DEFAULT_LEVEL, get_level
from .convert.api import convert_model

_level = DEFAULT_LEVEL


def set_optimization_level(level):
    """Set the level at which :func:`QModule` converts models from now on.

    From the original ActNN package. Models that are already converted keep
    their level.

    Args:
        level (str | dict | Level): See :func:`mmactnn.get_level`.

    Raises:
        ValueError: If there is no level of that name.
        TypeError: If ``level`` has none of these types.
    """
    global _level
    _level = get_level(level)


def QModule(model):
    """Convert a model at the level of :func:`set_optimization_level`.

    Unlike the original it does not wrap the model: the same module is
    returned, with its weights and ``state_dict`` keys.

    Args:
        model (nn.Module): The model, converted in place.

    Returns:
        nn.Module: ``model`` itself.
    """
    convert_model(model, level=_level)
    return model


@contextlib.contextmanager
def as_parents(model):
    """Give the layers of a model the classes of their parents, in a context.

    For tools that look up exact types, such as MMCV's
    ``get_model_complexity_info``. Nothing is compressed inside. Settings,
    bits in force and fused blocks are as before afterwards.

    Args:
        model (nn.Module): The model, converted or not.

    Yields:
        nn.Module: ``model`` itself.

    Examples:
        >>> with mmactnn.as_parents(model):
        ...     flops, params = get_model_complexity_info(model, (3, 224, 224))
    """
    classes = []
    for module in model.modules():
        plain = getattr(type(module), 'plain_class', None)
        if plain is not None:
            # A layer's parent class is known to the instance alone.
            classes.append((module, type(module), module.plain_class))
    for module, _, plain in classes:
        module.__class__ = plain
    try:
        yield model
    finally:
        for module, own, _ in classes:
            module.__class__ = own
