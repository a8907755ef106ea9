"""Memory-efficient training with 2-bit activations."""

from .compat import QModule, as_parents, set_optimization_level
from .compiler import (
    compile,
    compile_options,
    compile_report,
    register_linear_use,
)
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
from .graphs import remove_cuda_graphs, use_cuda_graphs
from .layers import *  # noqa: F403  (whatever is registered there)
from .layers import __all__ as _layers
from .memory import ActivationMeter, measure_activations
from .mmlab.waiting import register_when_loaded
from .offload import HostSwap
from .precision import AdaptivePrecision
from .random import RoundingGenerator, manual_seed
from .registry import (
    register_adapter,
    register_function,
    register_layer,
    register_pattern,
)
from .segments import checkpoint

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
    'QModule',
    'RoundingGenerator',
    'Rule',
    '__version__',
    'as_parents',
    'checkpoint',
    'compile',
    'compile_options',
    'compile_report',
    'convert_model',
    'get_level',
    'get_precision',
    'manual_seed',
    'measure_activations',
    'register_adapter',
    'register_function',
    'register_layer',
    'register_linear_use',
    'register_pattern',
    'remove_cuda_graphs',
    'revert_model',
    'set_optimization_level',
    'use_cuda_graphs',
    *_layers,
]

# Last, since its imports may need any of the above.
register_when_loaded()
