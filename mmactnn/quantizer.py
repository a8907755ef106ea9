"""The settings of one layer."""

import copy

from . import ops
from .payload import QuantizedTensor
from .random import default_generator


class LayerQuantizer:
    """How one layer keeps its input, and where it reports what it keeps.

    Args:
        bits (int, optional): Bits a code; None keeps the input exactly.
            Valid values are 1, 2, 4 and 8.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        own_bits (bool, optional): Whether the layer's own constructor fixed
            the bits, so that no level changes them. Defaults to False.
        generator (RoundingGenerator, optional): Source of random bits.
            Defaults to the one that all unconverted layers share.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
    """

    def __init__(self, bits, group_size=256, own_bits=False, generator=None):
        ops.check_format(1 if bits is None else bits, group_size)
        self.bits = bits
        self.group_size = group_size
        self.own_bits = own_bits
        self.generator = generator or default_generator
        self.meter = None

    @property
    def exact(self):
        """bool: Whether the layer behaves as its torch parent."""
        return self.bits is None

    def pack(self, tensor):
        """Quantise a tensor.

        Args:
            tensor (Tensor[N, *]): float32, float16 or bfloat16.

        Returns:
            QuantizedTensor: The payload.
        """
        return QuantizedTensor.pack(
            tensor, self.bits, self.group_size, self.generator
        )

    def note(self, kept, exact):
        """Report to the meter, if one is attached, what a call keeps.

        Args:
            kept (tuple[Tensor]): Tensors that are kept in place of ...
            exact (tuple[Tensor]): ... those that torch would have kept.
        """
        if self.meter is not None:
            self.meter.note(kept, exact)

    def __deepcopy__(self, memo):
        """A copy with a generator of its own, unless it is the shared one.

        The layers of a copied model share one generator again, the copy.
        """
        twin = LayerQuantizer(self.bits, self.group_size, self.own_bits)
        if self.generator is not default_generator:
            twin.generator = copy.deepcopy(self.generator, memo)
        return twin

    def __getstate__(self):
        """For pickle: the shared generator and the meter stay behind."""
        state = self.__dict__.copy()
        state['meter'] = None
        if self.generator is default_generator:
            state['generator'] = None
        return state

    def __setstate__(self, state):
        """Undo :meth:`__getstate__`."""
        self.__dict__.update(state)
        self.generator = self.generator or default_generator

    def __repr__(self):
        return (
            f'{type(self).__name__}(bits={self.bits}, '
            f'group_size={self.group_size})'
        )
