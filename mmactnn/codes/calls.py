"""Calls of layers, as input of the rules for tensors that torch saves."""

from typing import NamedTuple


class Call(NamedTuple):
    """Tensors of one call of a layer, for a meter to count.

    A field is None where the layer has no such tensor. Tensors that only
    torch's layer would have, such as the copy of an input that is
    overwritten, are on the meta device: only their size matters.

    Attributes:
        input (Tensor[*], optional): Input that the layer computed with, in
            the dtype of autocast; before an operation in place if torch keeps
            it so.
        output (Tensor[*], optional): The output.
        weight (Tensor[*], optional): Weight, likewise, or the second factor
            of a product.
        statistics (tuple[Tensor]): Statistics that a normalisation keeps of
            its input, such as mean and inverse standard deviation.
        mask (Tensor[*], optional): Factors of dropout, or a mask.
        indices (Tensor[*], optional): Positions of maxima.
        inplace (bool): Whether the output is written over the input.
        needs_input (bool): Whether the input requires a gradient.
        needs_weight (bool): Whether the weight requires a gradient.
    """

    input: object = None
    output: object = None
    weight: object = None
    statistics: tuple = ()
    mask: object = None
    indices: object = None
    inplace: bool = False
    needs_input: bool = True
    needs_weight: bool = True
