"""Payloads that decode to the very tensor: booleans as bits, chosen rows."""

import torch

from .. import ops
from ..ops import layout
from .payload import KINDS, Payload, PayloadFormat

# Bits of a number in float32, more than any layer asks for.
_ALL_BITS = 32


class BoolTensor(Payload):
    """Payload of booleans with a bit for each.

    Args:
        format (PayloadFormat): Shape and layout.
        bits (Tensor[ceil(numel / 8)]): uint8, see
            :func:`mmactnn.ops.relu_mask`.
    """

    of_codes_alone = False
    is_exact = True

    def __init__(self, format, bits):
        self.format = format
        self.operands = (bits,)

    @classmethod
    def pack(cls, mask):
        """Make the payload of a mask, where the device has kernels.

        Args:
            mask (Tensor[*]): bool; or float32, float16 or bfloat16, of which
                the positive numbers count. Any layout.

        Returns:
            BoolTensor: The payload.
        """
        values = layout.dense(mask)
        if mask.is_floating_point():
            _, bits = ops.relu_mask(values)
        else:
            bits = ops.relu_mask_(values.half())
        format = PayloadFormat(
            mask.shape, values.stride(), torch.bool, 1, 0, 'bool'
        )
        return cls(format, bits)

    def unpack(self, start=None, stop=None):
        """See the base class; all samples are decoded."""
        (bits,), format = self.operands, self.format
        ones = torch.empty_strided(
            format.size,
            format.stride,
            dtype=torch.float16,
            device=bits.device,
        ).fill_(1)
        mask = ops.relu_mask_backward(ones, bits) > 0
        return mask if start is None and stop is None else mask[start:stop]


class ChosenTensor(Payload):
    """Payload of elements that an index tensor chooses from a leaf.

    Both are alive anyway: the leaf is a parameter, and torch keeps the index.

    Args:
        format (PayloadFormat): Shape, layout and dtype.
        source (Tensor[*]): The leaf.
        index (Tensor[*]): Index of its first dimension: integers or a mask.
    """

    of_codes_alone = False
    is_exact = True

    def __init__(self, format, source, index):
        self.format = format
        self.operands = (source, index)

    @classmethod
    def of(cls, tensor, source, index):
        """Payload of ``source[index]``.

        Args:
            tensor (Tensor[*]): The chosen elements.
            source (Tensor[*]): See the class.
            index (Tensor[*]): See the class.

        Returns:
            ChosenTensor: The payload.
        """
        format = PayloadFormat(
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            _ALL_BITS,
            0,
            'chosen',
        )
        return cls(format, source.detach(), index)

    def unpack(self, start=None, stop=None):
        """See the base class; all samples are decoded."""
        source, index = self.operands
        values = source.detach()[index]
        return values if start is None and stop is None else values[start:stop]


KINDS.update(bool=BoolTensor, chosen=ChosenTensor)
