"""What configs call the compressed layers."""

from .adapters import MODEL_NAMES, LayeredModule
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
    QDropout2d,
    QGroupNorm,
    QLeakyReLU,
    QLinear,
    QMaxPool2d,
    QReLU,
    QReLU6,
    QSiLU,
    QSyncBatchNorm,
    QuantizedLayer,
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
    QDropout2d: ('QDropout2d',),
}

_TYPE_NAMES = {name for names in LAYER_NAMES.values() for name in names}
_TYPE_NAMES.update(MODEL_NAMES)


def require_named_layers(model, config, include, exclude):
    """Raise if a config names compressed layers and its model has none.

    Args:
        model (nn.Module): The model, after its conversion.
        config (dict, optional): Config of the model.
        include (list[str], optional): Filter of the conversion, for the
            message.
        exclude (list[str]): Likewise.

    Raises:
        RuntimeError: If that is so.
    """
    named = _named_types(config)
    if named and not any(
        isinstance(m, QuantizedLayer) for m in model.modules()
    ):
        raise RuntimeError(
            f'the config names {", ".join(sorted(named))}, but no layer '
            'of the model is compressed: something has turned them back '
            'into plain layers, and include/exclude of ActNNHook keep '
            f'them so (include={include}, exclude={exclude})'
        )


def _named_types(config):
    """The compressed layer types that a model's config names."""
    if isinstance(config, dict):
        name = _name_of(config.get('type'))
        found = set()
        if name is not None and name.split('.')[-1] in _TYPE_NAMES:
            found.add(name)
        return found.union(*(_named_types(v) for v in config.values()))
    if isinstance(config, (list, tuple)):
        return set().union(*(_named_types(item) for item in config))
    return set()


def _name_of(kind):
    """Name of a type in a config: text, a class, or one that is not built."""
    if isinstance(kind, type):
        ours = issubclass(kind, (QuantizedLayer, LayeredModule))
        return kind.__name__ if ours else None
    # MMEngine's lazy objects tell their names as text.
    return None if kind is None else str(kind)
