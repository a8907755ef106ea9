"""Product of two matrices that are both computed."""

import torch

from .autocast import cast, lower_dtype
from .product import Bilinear


def _by_left(grad_output, other, shape):
    return (grad_output @ other.mT).sum_to_size(shape)


def _by_right(grad_output, input, shape):
    if len(shape) == 2:
        # One product, instead of a sum of one for each matrix.
        input, grad_output = input.flatten(0, -2), grad_output.flatten(0, -2)
    return (input.mT @ grad_output).sum_to_size(shape)


_MATMUL = Bilinear(torch.matmul, (_by_left, _by_right))


def matrix_product(input, other, quantizer):
    """``input @ other`` with large factors kept as codes.

    The output is exact. The gradient of a factor is linear in the other one,
    hence unbiased.

    Args:
        input (Tensor[*, M, K]): float32, float16 or bfloat16; under autocast
            it is cast to autocast's dtype.
        other (Tensor[*, K, N]): Likewise.
        quantizer (LayerQuantizer): Settings of the layer.

    Returns:
        Tensor[*, M, N]: The product.
    """
    factors = cast(lower_dtype(input), input, other)
    return _MATMUL(*factors, quantizer)
