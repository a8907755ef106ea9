"""Payloads: codes and ranges that stand for a tensor."""

import math
from typing import NamedTuple

import torch

from .. import ops
from .hooks import keep_tensors
from .saved_bits import bits_to_tensors, split_saved

# All samples of a tensor, as a range of them.
WHOLE = slice(None)


class PayloadFormat(NamedTuple):
    """Format of a payload: all but its tensors, for ``ctx``.

    Attributes:
        size (torch.Size): Shape of the tensor.
        stride (tuple[int]): Its strides.
        dtype (torch.dtype): Its dtype.
        bits (float): Bits a code; their mean where each sample has bits of
            its own.
        group_size (int): Elements a range.
        kind (str): Kind of the payload, a key of :data:`KINDS`.
        drawn (DrawnBits, optional): Random bits that the tensor was rounded
            with; None: codes alone are decoded.
        saves_bits (bool): Whether the random bits are saved, as the last
            tensors of a payload: those of ``drawn`` need not be the ones that
            belong to the codes of the backward pass, see
            :func:`.hooks.keep_tensors`.
        source (tuple, optional): Format of the tensor that another one was
            derived from, and how, see :mod:`.moved`.
        smooth (Smooth, optional): Function whose value the tensor is, where
            the codes are those of its argument.
    """

    size: torch.Size
    stride: tuple
    dtype: torch.dtype
    bits: float
    group_size: int
    kind: str = 'plain'
    drawn: ops.DrawnBits | None = None
    saves_bits: bool = False
    source: tuple | None = None
    smooth: ops.Smooth | None = None

    @classmethod
    def of(
        cls, tensor, bits, group_size, kind='plain', drawn=None, smooth=None
    ):
        """Format of a tensor that is quantised now, in its own layout."""
        layout = tensor.shape, tensor.stride(), tensor.dtype
        saves_bits = drawn is not None and not keep_tensors()
        return cls(
            *layout,
            bits,
            group_size,
            kind,
            drawn,
            saves_bits,
            smooth=smooth,
        )

    def make(self, *operands):
        """Make a payload from this format and tensors that were just made.

        Args:
            *operands (Tensor, optional): Its ``operands``.

        Returns:
            Payload: The payload.
        """
        return KINDS[self.kind](self, *operands)

    def payload(self, *tensors):
        """Make a payload from this format and saved tensors.

        Args:
            *tensors (Tensor, optional): Its ``tensors``.

        Returns:
            Payload: The payload.
        """
        format, operands = self.split_saved(tensors)
        return format.make(*operands)

    @property
    def bits_to_save(self):
        """tuple[Tensor]: Random bits, to be saved behind the operands."""
        return bits_to_tensors(self.drawn) if self.saves_bits else ()

    def split_saved(self, tensors):
        """Take the random bits from saved tensors.

        Args:
            tensors (Sequence[Tensor | None]): Operands, and what
                ``bits_to_save`` was.

        Returns:
            tuple[PayloadFormat, Sequence[Tensor | None]]: This format, with
            the random bits that belong to the operands; operands.
        """
        if not self.saves_bits:
            return self, tensors
        operands, drawn = split_saved(tensors, self.drawn)
        return self._replace(drawn=drawn), operands


class Payload:
    """Base class of codes that stand for a tensor.

    Its tensors go through ``ctx.save_for_backward``, its format stays on
    ``ctx``; :meth:`PayloadFormat.payload` joins both again.

    Attributes:
        format (PayloadFormat): Shape, layout, dtype and bits.
        operands (tuple[Tensor | None]): Tensors that are decoded.
        rectified (bool): Whether the tensor is a rectifier's output.
        layer_bits (LayerBits, optional): Source of its bits, if adaptive.
        of_codes_alone (bool): Whether the operands are those of one op that
            decodes.
        is_exact (bool): Whether it decodes to the very tensor.
    """

    rectified = False
    of_codes_alone = True
    is_exact = False
    layer_bits = None

    @property
    def tensors(self):
        """tuple[Tensor | None]: Tensors to save for backward."""
        if not self.format.saves_bits:
            return self.operands
        return *self.operands, *self.format.bits_to_save

    @property
    def nbytes(self):
        """int: Bytes of codes, ranges and bits of samples."""
        return sum(t.nbytes for t in self.operands if t is not None)

    def unpack(self, start=None, stop=None):
        """Dequantise all samples or a range of them.

        Args:
            start (int, optional): First sample. Defaults to 0.
            stop (int, optional): One past the last sample. Defaults to all.

        Returns:
            Tensor[stop - start, *]: In the original dtype and layout.
        """
        raise NotImplementedError

    def chunks(self, max_bytes):
        """Dequantise piece by piece.

        Args:
            max_bytes (int, optional): Most bytes of a piece; one sample at
                least. None for all in one.

        Yields:
            tuple[slice, Tensor]: Samples and their values.
        """
        size = self.format.size
        nbytes = 0
        if max_bytes is not None:
            nbytes = size.numel() * self.format.dtype.itemsize
        for part in pieces(size[0], nbytes, max_bytes):
            yield part, self.unpack(part.start, part.stop)

    def astype(self, dtype):
        """This payload for the tensor in another dtype.

        Args:
            dtype (torch.dtype): float32, float16 or bfloat16.

        Returns:
            Payload: It keeps the same tensors; this one itself if it has the
            dtype, or decodes to its own only.
        """
        return self

    def _layout(self, samples):
        """Size, strides and dtype of a number of samples."""
        format = self.format
        return (samples, *format.size[1:]), format.stride, format.dtype

    def _drawn(self, start):
        """Random bits of the samples from ``start`` on."""
        drawn = self.format.drawn
        return drawn if drawn is None or not start else drawn.at_row(start)


def pieces(samples, nbytes, max_bytes):
    """Divide the samples of a tensor into pieces of limited size.

    Pieces are as few as possible, and about equal: a small rest would cost
    the calls of a whole piece, and blocks of a size that the caching
    allocator cannot reuse.

    Args:
        samples (int): Number of samples.
        nbytes (int): Bytes of all samples.
        max_bytes (int, optional): Most bytes of a piece; one sample at least.
            None is no limit.

    Yields:
        slice: Samples, ``WHOLE`` where one piece is all.
    """
    if max_bytes is None or nbytes <= max_bytes or samples <= 1:
        yield WHOLE
        return
    most = max(1, int(samples * max_bytes // nbytes))
    step = math.ceil(samples / math.ceil(samples / most))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


class QuantizedTensor(Payload):
    """Payload with codes of a tensor's values.

    Args:
        format (PayloadFormat): Shape, layout, dtype and bits.
        codes (Tensor[N, ceil(M / 8) * bits] | Tensor[*]): uint8, see
            :func:`mmactnn.ops.quantize` and, with bits of their own for the
            samples, :func:`mmactnn.ops.quantize_rows`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        row_bits (Tensor[N], optional): uint8, bits of each sample.
        row_starts (Tensor[N], optional): int32, sum of the bits of earlier
            samples.
    """

    def __init__(self, format, codes, ranges, row_bits=None, row_starts=None):
        self.format = format
        self.codes = codes
        self.ranges = ranges
        self.row_bits = row_bits
        self.row_starts = row_starts
        self.operands = (codes, ranges)
        if row_bits is not None:
            self.operands = (codes, ranges, row_bits, row_starts)

    def unpack(self, start=None, stop=None):
        """See the base class."""
        format = self.format
        if self.row_bits is None:
            codes, ranges = _part(start, stop, self.codes, self.ranges)
            layout = self._layout(ranges.shape[0])
            return ops.dequantize(
                codes,
                ranges,
                *layout,
                format.bits,
                format.group_size,
                drawn=self._drawn(start),
            )
        ranges, bits, starts = _part(
            start, stop, self.ranges, self.row_bits, self.row_starts
        )
        layout = self._layout(ranges.shape[0])
        return ops.dequantize_rows(
            self.codes,
            ranges,
            bits,
            starts,
            *layout,
            format.group_size,
            drawn=self._drawn(start),
        )


class CentredTensor(QuantizedTensor):
    """Payload with the means of channels, and codes of what differs from them.

    Channels are the last dimension. Where their means are large beside what
    differs from them, as in many inputs of linear layers, the ranges of
    groups, which hold elements of many channels, are much smaller so.

    Args:
        format (PayloadFormat): Shape, layout, dtype and bits.
        means (Tensor[C]): float32, of all samples.
        *operands (Tensor): Those of :class:`QuantizedTensor`.
    """

    of_codes_alone = False

    def __init__(self, format, means, *operands):
        super().__init__(format, *operands)
        self.means = means
        self.operands = (means, *self.operands)

    @classmethod
    def pack(cls, tensor, pack):
        """Quantise a tensor.

        Args:
            tensor (Tensor[*, C]): float32, float16 or bfloat16.
            pack (Callable): Quantises a tensor of the same shape and dtype to
                a :class:`QuantizedTensor`.

        Returns:
            CentredTensor: The payload.
        """
        means = tensor.reshape(-1, tensor.shape[-1]).mean(
            0, dtype=torch.float32
        )
        # In float32, rounded once.
        rest = torch.sub(tensor, means, out=torch.empty_like(tensor))
        payload = pack(rest)
        format = payload.format._replace(kind='centred')
        return cls(format, means, *payload.operands)

    def unpack(self, start=None, stop=None):
        """See the base class."""
        return super().unpack(start, stop).add_(self.means)


class SplitTensor(Payload):
    """Payload of a rectified normalised tensor, with its normalised values.

    Args:
        format (PayloadFormat): Shape, layout, dtype and bits.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, split codes; see
            :func:`mmactnn.ops.norm_act`.
        ranges (Tensor[N, ceil(M / group_size), R]): bfloat16, R being 4, or
            3 for rotated codes.
        weight (Tensor[C], optional): float32, scale of the normalisation.
        bias (Tensor[C], optional): float32, shift of the normalisation.
    """

    rectified = True

    def __init__(self, format, codes, ranges, weight=None, bias=None):
        self.format = format
        self.codes = codes
        self.ranges = ranges
        self.weight = weight
        self.bias = bias

    @property
    def operands(self):
        """tuple[Tensor | None]: See the base class."""
        return self.codes, self.ranges, self.weight, self.bias

    def unpack(self, start=None, stop=None):
        """See the base class."""
        codes, ranges = _part(start, stop, self.codes, self.ranges)
        return ops.dequantize_split(
            codes,
            ranges,
            self.weight,
            self.bias,
            *self._layout(ranges.shape[0]),
            self.format.bits,
            self.format.group_size,
            drawn=self._drawn(start),
        )


class ZeroedTensor(Payload):
    """Payload of a rectifier's output, with codes of which 0 is exactly zero.

    Args:
        format (PayloadFormat): Shape, layout, dtype and bits.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, zeroed codes; see
            :func:`mmactnn.ops.norm_act`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
    """

    rectified = True

    def __init__(self, format, codes, ranges):
        self.format = format
        self.codes = codes
        self.ranges = ranges

    @property
    def operands(self):
        """tuple[Tensor]: See the base class."""
        return self.codes, self.ranges

    def unpack(self, start=None, stop=None):
        """See the base class."""
        codes, ranges = _part(start, stop, self.codes, self.ranges)
        return ops.dequantize_zeroed(
            codes,
            ranges,
            *self._layout(ranges.shape[0]),
            self.format.bits,
            self.format.group_size,
            drawn=self._drawn(start),
        )


class SmoothTensor(Payload):
    """Payload of a smooth activation's output, with codes of its input.

    One code of the input serves the activation's backward pass and the layers
    that read the output; behind a normalisation, a code of the normalised
    value serves that, too.

    Args:
        format (PayloadFormat): Shape, layout, dtype, bits and function.
        codes (Tensor[N, ceil(M / 8) * bits]): uint8, codes of the input; see
            :func:`mmactnn.ops.quantize`.
        ranges (Tensor[N, ceil(M / group_size), 2]): bfloat16.
        weight (Tensor[C], optional): float32, scale of the normalisation.
        bias (Tensor[C], optional): float32, shift of the normalisation.
    """

    of_codes_alone = False

    def __init__(self, format, codes, ranges, weight=None, bias=None):
        self.format = format
        self.operands = (codes, ranges, weight, bias)

    def unpack(self, start=None, stop=None):
        """See the base class."""
        codes, ranges = _part(start, stop, *self.operands[:2])
        format = self.format
        return ops.smooth_decode(
            codes,
            ranges,
            *self._layout(ranges.shape[0]),
            format.smooth,
            format.bits,
            format.group_size,
            drawn=self._drawn(start),
            **self._normalisation,
        )

    def gradient(self, grad_output):
        """Gradient of the input of the activation.

        Args:
            grad_output (Tensor[N, *]): Gradient of its output, with the
                strides of the payload.

        Returns:
            Tensor[N, *]: The gradient.
        """
        format = self.format
        return ops.smooth_decode_backward(
            grad_output,
            *self.operands[:2],
            format.smooth,
            format.bits,
            format.group_size,
            drawn=format.drawn,
            **self._normalisation,
        )

    @property
    def _normalisation(self):
        weight, bias = self.operands[2:]
        return dict(weight=weight, bias=bias)


def _part(start, stop, *tensors):
    """Slice tensors to a range of samples."""
    if start is None and stop is None:
        return tensors
    return [tensor[start:stop] for tensor in tensors]


# Classes of payloads by kind.
KINDS = dict(
    plain=QuantizedTensor,
    centred=CentredTensor,
    split=SplitTensor,
    zeroed=ZeroedTensor,
    smooth=SmoothTensor,
)
