"""Memory-efficient training with 2-bit activations."""

from .compat import QModule, as_parents, set_optimization_level
from .config import (
    LEVELS,
    Compression,
    Execution,
    Level,
    Offload,
    Rule,
    get_level,
)
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
from .mmlab.waiting import register_when_loaded
from .offload import HostSwap
from .precision import AdaptivePrecision
from .random import RoundingGenerator, manual_seed

# A literal: building a wheel reads it without importing torch.
__version__ = '0.1.0'

__all__ = [
    'ActivationMeter',
    'AdaptivePrecision',
    'Compression',
    'ConversionReport',
    'Execution',
    'HostSwap',
    'LEVELS',
    'Level',
    'Offload',
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
    'as_parents',
    'convert_model',
    'get_level',
    'get_precision',
    'manual_seed',
    'measure_activations',
    'revert_model',
    'set_optimization_level',
]

# Last: what it imports may import any of the above.
register_when_loaded()
