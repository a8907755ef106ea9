"""The two calls that users of the original ActNN package know."""

from .config import DEFAULT_LEVEL, get_level
from .convert.api import convert_model

_level = DEFAULT_LEVEL


def set_optimization_level(level):
    """Choose the level of models that :func:`QModule` converts from now on.

    Models converted before keep theirs.

    Args:
        level (str | Level): See :data:`mmactnn.config.LEVELS`.

    Raises:
        ValueError: If there is no level of that name.
        TypeError: If it is neither a name nor a level.
    """
    global _level
    _level = get_level(level)


def QModule(model):
    """Convert a model at the level of :func:`set_optimization_level`.

    Unlike the original this wraps nothing and loses nothing: the same module
    is returned, with its weights and ``state_dict`` keys.

    Args:
        model (nn.Module): The model, converted in place.

    Returns:
        nn.Module: ``model`` itself.
    """
    convert_model(model, level=_level)
    return model
