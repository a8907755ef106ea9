"""What a layer keeps of a tensor."""

from typing import NamedTuple

import torch

from . import ops


class PayloadFormat(NamedTuple):
    """All of a payload but its tensors: what ``ctx`` keeps beside them.

    Attributes:
        size (torch.Size): Shape of the tensor.
        stride (tuple[int]): Its strides.
        dtype (torch.dtype): Its dtype.
        bits (int): Bits a code.
        group_size (int): Elements a range.
    """

    size: torch.Size
    stride: tuple
    dtype: torch.dtype
    bits: int
    group_size: int


class QuantizedTensor:
    """A tensor as codes of a few bits.

    Its tensors go through ``ctx.save_for_backward``, its format stays on
    ``ctx``; together they make the payload again.

    Args:
        format (PayloadFormat): Shape, layout, dtype and bits.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, see
            :func:`mmactnn.ops.quantize`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
    """

    def __init__(self, format, codes, ranges):
        self.format = format
        self.codes = codes
        self.ranges = ranges

    @classmethod
    def pack(cls, tensor, bits, group_size, generator):
        """Quantise a tensor.

        Args:
            tensor (Tensor[N, *]): float32, float16 or bfloat16.
            bits (int): Bits a code. Valid values are 1, 2, 4 and 8.
            group_size (int): Elements a range: 64, 128, 256 or 512.
            generator (RoundingGenerator): Source of the random bits.

        Returns:
            QuantizedTensor: The payload.

        Raises:
            ValueError, TypeError, RuntimeError: As
                :func:`mmactnn.ops.quantize`.
        """
        rows = ops.layout.dense_rows(tensor)
        seed, offset = generator.next()
        codes, ranges = ops.quantize(
            rows, bits, group_size, seed=seed, offset=offset
        )
        format = PayloadFormat(
            rows.shape, rows.stride(), rows.dtype, bits, group_size
        )
        return cls(format, codes, ranges)

    @property
    def tensors(self):
        """tuple[Tensor, Tensor]: What to save for backward."""
        return self.codes, self.ranges

    @property
    def nbytes(self):
        """int: Bytes of codes and ranges."""
        return self.codes.nbytes + self.ranges.nbytes

    def unpack(self, start=None, stop=None):
        """Dequantise all samples or a range of them.

        Args:
            start (int, optional): First sample. Defaults to 0.
            stop (int, optional): One past the last sample. Defaults to all.

        Returns:
            Tensor[stop - start, *]: In the original dtype and layout.
        """
        format = self.format
        codes, ranges, size = self.codes, self.ranges, format.size
        if start is not None or stop is not None:
            codes, ranges = codes[start:stop], ranges[start:stop]
            size = (codes.shape[0], *size[1:])
        return ops.dequantize(
            codes,
            ranges,
            size,
            format.stride,
            format.dtype,
            format.bits,
            format.group_size,
        )
