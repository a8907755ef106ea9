"""Compressed products of two activations."""

import torch
from torch import nn

from ..autograd import matrix_product, product
from ..registry import register_layer
from .gateway import run
from .smooth import SmoothLayer


class Product(nn.Module):
    """``input * other`` as a layer, which torch does not have."""

    def forward(self, input, other):
        """Multiply.

        Args:
            input (Tensor[N, *]): The first factor.
            other (Tensor[*]): The second one, in a shape that broadcasts with
                the first one's.

        Returns:
            Tensor[N, *]: The product.
        """
        return input * other


def _saved_factors(call):
    return (
        call.input if call.needs_weight else None,
        call.weight if call.needs_input else None,
    )


@register_layer(Product, saved_by_torch=_saved_factors)
class QProduct(SmoothLayer, Product):
    """``Product`` that keeps its factors as codes of a few bits.

    The output is exact, and the gradients are unbiased. Each factor is the
    derivative by the other one, so that the bits are those of derivatives.
    Factors that are leaves of the graph, of less than an eighth of the
    elements of the largest tensor, or results that the function before keeps,
    are kept themselves. In eval mode, without grad and at level L0 it is
    ``Product``.

    Args:
        bits (int, optional): Bits an element of the factors at every level
            but L0. Valid values are 1 to 8. Defaults to the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.

    Examples:
        >>> x = torch.randn(2, 8, requires_grad=True)
        >>> QProduct()(x.exp(), x.sin()).sum().backward()
    """

    def forward(self, input, other):
        """See ``Product``."""
        return run(
            self,
            Product.forward,
            QProduct._compress,
            (input, other),
            (other,),
        )

    def _compress(self, input, other):
        if not input.dim() or not other.dim():
            return Product.forward(self, input, other)
        return product(input, other, self.quantizer)


class MatrixProduct(nn.Module):
    """``input @ other`` as a layer, which torch does not have."""

    def forward(self, input, other):
        """Multiply.

        Args:
            input (Tensor[*, M, K]): The first factor.
            other (Tensor[*, K, N]): The second one.

        Returns:
            Tensor[*, M, N]: The product.
        """
        return torch.matmul(input, other)


@register_layer(MatrixProduct, saved_by_torch=_saved_factors)
class QMatrixProduct(SmoothLayer, MatrixProduct):
    """``MatrixProduct`` that keeps its factors as codes of a few bits.

    The output is exact, and the gradients are unbiased: that of a factor is
    linear in the codes of the other one, which are rounded independently.
    Factors are kept themselves as by :class:`QProduct`. In eval mode, without
    grad, at level L0 and for vectors it is ``MatrixProduct``.

    Args:
        bits (int, optional): As :class:`QProduct`.
        group_size (int, optional): As :class:`QProduct`.

    Examples:
        >>> x = torch.randn(2, 8, 8, requires_grad=True)
        >>> QMatrixProduct()(x.cos(), x.sin()).sum().backward()
    """

    def forward(self, input, other):
        """See ``MatrixProduct``."""
        return run(
            self,
            MatrixProduct.forward,
            QMatrixProduct._compress,
            (input, other),
            (other,),
        )

    def _compress(self, input, other):
        if input.dim() < 2 or other.dim() < 2:
            return MatrixProduct.forward(self, input, other)
        return matrix_product(input, other, self.quantizer)
