"""Payload of a normalised tensor, with its scale and shift."""

import torch

from .payload import KINDS, QuantizedTensor


class NormalisedTensor(QuantizedTensor):
    """Payload of ``weight * x^ + bias`` that holds codes of x^.

    Args:
        format (PayloadFormat): Shape, layout, dtype and bits.
        means (Tensor[*]): float32, means of the channels of x^, of the shape
            of the last dimensions of the tensor.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, of x^ less the means.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        weight (Tensor[*], optional): Scale of the normalisation.
        bias (Tensor[*], optional): Shift of the normalisation.
    """

    of_codes_alone = False

    def __init__(self, format, means, codes, ranges, weight=None, bias=None):
        super().__init__(format, codes, ranges)
        self.means = means
        self.weight = weight
        self.bias = bias
        self.operands = (means, codes, ranges, weight, bias)

    @classmethod
    def of(cls, payload, weight, bias):
        """Payload of a normalised tensor after scale and shift.

        Args:
            payload (CentredTensor): Payload of x^.
            weight (Tensor[*], optional): The scale.
            bias (Tensor[*], optional): The shift.

        Returns:
            NormalisedTensor: It keeps the same tensors, and these.
        """
        format = payload.format._replace(kind='normalised')
        parameters = (
            None if p is None else p.detach() for p in (weight, bias)
        )
        return cls(format, *payload.operands, *parameters)

    def astype(self, dtype):
        """See the base class."""
        if dtype == self.format.dtype:
            return self
        return type(self)(self.format._replace(dtype=dtype), *self.operands)

    def unpack(self, start=None, stop=None):
        """See the base class."""
        rest = super().unpack(start, stop)
        shift, weight, bias = self.means, self.weight, self.bias
        if weight is None:
            return rest.add_(shift if bias is None else shift + bias)
        # In float32, rounded once.
        if bias is None:
            shift = shift * weight
        else:
            shift = torch.addcmul(bias, shift, weight)
        return torch.addcmul(shift, rest, weight, out=rest)


KINDS['normalised'] = NormalisedTensor
