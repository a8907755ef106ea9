"""Memory-efficient training with 2-bit activations."""

import importlib.util

from .compat import QModule, set_optimization_level
from .config import LEVELS, Level, Rule, get_level
from .convert import (
    ConversionReport,
    convert_model,
    get_precision,
    revert_model,
)
from .layers import (
    QAdaptiveAvgPool2d,
    QAvgPool2d,
    QBatchNorm,
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
from .memory import ActivationMeter, measure_activations
from .precision import AdaptivePrecision
from .random import RoundingGenerator, manual_seed
from .version import __version__

if importlib.util.find_spec('mmengine') is not None:
    from .mmlab import registry  # noqa: F401  (makes the types known to configs)

__all__ = [
    'ActivationMeter',
    'AdaptivePrecision',
    'ConversionReport',
    'LEVELS',
    'Level',
    'QAdaptiveAvgPool2d',
    'QAvgPool2d',
    'QBatchNorm',
    'QBatchNorm1d',
    'QBatchNorm2d',
    'QBatchNorm3d',
    'QConv1d',
    'QConv2d',
    'QConv3d',
    'QConvTranspose1d',
    'QConvTranspose2d',
    'QConvTranspose3d',
    'QGroupNorm',
    'QLinear',
    'QDropout',
    'QDropout2d',
    'QLeakyReLU',
    'QMaxPool2d',
    'QModule',
    'QReLU',
    'QReLU6',
    'QSiLU',
    'QSyncBatchNorm',
    'QuantizedLayer',
    'RoundingGenerator',
    'Rule',
    '__version__',
    'convert_model',
    'get_level',
    'get_precision',
    'manual_seed',
    'measure_activations',
    'revert_model',
    'set_optimization_level',
]
