"""Calls of layers, as rules for what torch keeps see them."""

from typing import NamedTuple


class Call(NamedTuple):
    """What one call of a layer read and made, for the count of a meter.

    A field is None where the layer has no such tensor. Tensors that torch
    would have and this package has not, such as the copy of an input that is
    overwritten, are on the meta device: only their size counts.

    Attributes:
        input (Tensor[*], optional): What the layer computed with: in the
            dtype of autocast, and as it was before an operation in place
            where torch keeps it so.
        output (Tensor[*], optional): The output.
        weight (Tensor[*], optional): Weight, likewise, or the second factor
            of a product.
        statistics (tuple[Tensor]): What normalisation keeps of its input:
            mean, inverse standard deviation and the like.
        mask (Tensor[*], optional): Factors of dropout, or a mask.
        indices (Tensor[*], optional): Positions of maxima.
        sigmoid (Tensor[*], optional): Value of the sigmoid, where a layer
            computes it apart.
        inplace (bool): Whether the output is written over the input.
        needs_input (bool): Whether the input requires a gradient.
        needs_weight (bool): Whether the weight does.
    """

    input: object = None
    output: object = None
    weight: object = None
    statistics: tuple = ()
    mask: object = None
    indices: object = None
    sigmoid: object = None
    inplace: bool = False
    needs_input: bool = True
    needs_weight: bool = True
