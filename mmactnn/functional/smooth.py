"""Smooth activations, which keep codes for their derivative."""

import torch
import torch.nn.functional as F

from .. import autograd, layers
from ..ops import Smooth
from ..registry import register_function


def _register(layer, make, arguments, *functions, **options):
    """Register functions that compute as an activation.

    Args:
        layer (type): Compressed class of the activation.
        make (Callable): Maps the arguments of the functions but ``inplace``
            to the function for kernels.
        arguments (Sequence[str]): Arguments behind the input, in order.
        *functions (Callable): The functions, the first of which runs.
        **options (object): See :func:`mmactnn.register_function`.
    """
    run = functions[0]

    def compress(quantizer, input, *args, **kwargs):
        kwargs.update(zip(arguments, args))
        inplace = kwargs.pop('inplace', False)
        # torch refuses to overwrite a leaf.
        if inplace and input.is_leaf and input.requires_grad:
            return NotImplemented
        function = make(**kwargs)
        if inplace:
            kwargs['inplace'] = True
        return autograd.smooth(
            input,
            lambda input: run(input, **kwargs),
            function,
            quantizer,
            layer.__name__,
        )

    compress.__name__ = run.__name__
    compress.__doc__ = f'``{run.__name__}``.'
    register_function(*functions, layer=layer, **options)(compress)


_register(layers.QGELU, Smooth.gelu, ['approximate'], F.gelu)
_register(layers.QSiLU, Smooth.silu, ['inplace'], F.silu)
_register(layers.QMish, Smooth.mish, ['inplace'], F.mish)
_register(layers.QHardswish, Smooth.hardswish, ['inplace'], F.hardswish)
_register(layers.QHardsigmoid, Smooth.hardsigmoid, ['inplace'], F.hardsigmoid)
_register(layers.QELU, Smooth.elu, ['alpha', 'inplace'], F.elu)
# Losses call the others, too, whose gradients all layers get.
_register(
    layers.QSoftplus,
    Smooth.softplus,
    ['beta', 'threshold'],
    F.softplus,
    needs_parameters=True,
)
_register(
    layers.QSigmoid,
    Smooth.sigmoid,
    [],
    torch.sigmoid,
    torch.Tensor.sigmoid,
    F.sigmoid,
    needs_parameters=True,
)
_register(
    layers.QTanh,
    Smooth.tanh,
    [],
    torch.tanh,
    torch.Tensor.tanh,
    F.tanh,
    needs_parameters=True,
)
