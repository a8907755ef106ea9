"""The settings of one layer."""

import copy
from typing import NamedTuple

from . import ops
from .payload import QuantizedTensor
from .random import default_generator


class OwnSettings(NamedTuple):
    """What a layer's own constructor fixed; None follows the model's level.

    Attributes:
        bits (int, optional): Bits a code.
        group_size (int, optional): Elements a range.
    """

    bits: int | None = None
    group_size: int | None = None


class LayerQuantizer:
    """How one layer keeps its input, and where it reports what it keeps.

    Args:
        bits (int, optional): Bits a code; None keeps the input exactly.
            Valid values are 1, 2, 4 and 8, and 0 for a layer that keeps no
            tensor.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        generator (RoundingGenerator, optional): Source of random bits.
            Defaults to the one that all unconverted layers share.
        own (OwnSettings, optional): What no level changes but the exact one.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
    """

    def __init__(
        self,
        bits,
        group_size=ops.DEFAULT_GROUP_SIZE,
        generator=None,
        own=OwnSettings(),  # noqa: B008  (immutable)
    ):
        ops.check_format(bits or 1, group_size)
        self.bits = bits
        self.group_size = group_size
        self.generator = generator or default_generator
        self.own = own
        self.meter = None

    @classmethod
    def for_level(cls, layer_class, level, group_size, generator, own):
        """The settings of a layer in a model of some level.

        Args:
            layer_class (type): Class of the layer, a ``QuantizedLayer``.
            level (Level): Level of the model.
            group_size (int): Elements a range, where the layer fixes none.
            generator (RoundingGenerator, optional): See the class.
            own (OwnSettings): What the layer's constructor fixed. It goes
                before the level, unless the level is exact throughout.

        Returns:
            LayerQuantizer: The settings.

        Raises:
            ValueError: If bits or group size are not valid.
        """
        bits = layer_class.level_bits(level)
        if own.bits is not None and not level.exact:
            bits = own.bits
        if bits is not None and layer_class.kind != 'mask':
            # Codes have bits; none at all are for layers without codes.
            ops.check_format(bits, group_size)
        if own.group_size is not None:
            group_size = own.group_size
        return cls(bits, group_size, generator, own)

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

    def keep(self, tensor, needed):
        """Quantise what a backward pass needs of a layer's input.

        Args:
            tensor (Tensor[N, *]): float32, float16 or bfloat16.
            needed (bool): Whether it needs anything.

        Returns:
            tuple[PayloadFormat, tuple[Tensor]]: What goes onto ``ctx`` and
            what through ``ctx.save_for_backward``; None and () if nothing is
            needed.
        """
        if not needed:
            return None, ()
        payload = self.pack(tensor)
        return payload.format, payload.tensors

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
        twin = LayerQuantizer(self.bits, self.group_size, own=self.own)
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
