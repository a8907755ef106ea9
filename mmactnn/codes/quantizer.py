"""The settings of one layer."""

import copy
from typing import NamedTuple

import torch

from .. import ops
from ..extension import has_kernels
from ..ops.quantize import VALID_DTYPES, check_rows
from ..precision import sensitivity
from ..precision.allocation import MAX_BITS, MIN_BITS
from ..random import default_generator
from .cache import default_cache
from .payload import PayloadFormat, QuantizedTensor
from .units import MIB


class OwnSettings(NamedTuple):
    """What a layer's own constructor fixed; None follows the model's level.

    Attributes:
        bits (int, optional): Bits a code.
        group_size (int, optional): Elements a range.
    """

    bits: int | None = None
    group_size: int | None = None


class FusedBits(NamedTuple):
    """Bits of the payloads of a normalisation that is fused.

    Attributes:
        plain (int): Of the normalised value, before an addition or alone.
        split (int): Of the normalised value, where it is rectified.
        zeroed (int): Of a rectified sum.
    """

    plain: int
    split: int
    zeroed: int

    @classmethod
    def of_level(cls, level, rectified):
        """The bits that a level gives, but for those of ``split``."""
        zeroed = int(level.norm if level.conv is None else level.conv)
        return cls(int(level.norm), rectified, max(2, zeroed))

    @classmethod
    def of_layer(cls, bits):
        """The bits of a layer that has bits of its own."""
        return cls(bits, min(bits + 1, 8), max(2, bits))


class Watch(NamedTuple):
    """How the backward pass of one call tells what rounding does to it.

    Attributes:
        slot (Slot): Whom it tells.
        producer (Slot, optional): For a normalisation, slot of the layer
            that made the input. Of the inputs of a convolution, which may be
            those of a head over several levels, each has another.
        collecting (bool): Whether layers report, or samples alone.
        adds_elements (bool): Whether the call keeps a payload of its own,
            not one that another call has counted.
    """

    slot: object
    producer: object
    collecting: bool
    adds_elements: bool = True

    def linear(self, payload, grad_output, grad_weight, fan):
        """Report a layer whose weight's gradient is linear in its input.

        Args:
            payload (QuantizedTensor): What was kept of the input.
            grad_output (Tensor[N, *]): Gradient of the output.
            grad_weight (Tensor[*]): Gradient of the weight.
            fan (float): See :func:`sensitivity.weight_gradient_variance`.
        """
        norms = sensitivity.squared_norms(grad_output)
        self.slot.observe_norms(norms)
        if not self.collecting:
            return
        cost = sensitivity.weight_gradient_variance(payload, norms, fan)
        self._report(payload, cost, cost.new_zeros(()), grad_weight)

    def norm(
        self, payload, grad_output, grad_input, grad_weight, weight, invstd
    ):
        """Report a batch normalisation.

        Args:
            payload (QuantizedTensor): What was kept of the input.
            grad_output (Tensor[N, C, *]): Gradient of the output.
            grad_input (Tensor[N, C, *], optional): That of the input; None
                where it is exact.
            grad_weight (Tensor[C], optional): That of the weight.
            weight (Tensor[C], optional): The weight.
            invstd (Tensor[C]): Inverse standard deviations.
        """
        if self.slot.precision.batch_size is not None:
            self.slot.observe_norms(sensitivity.squared_norms(grad_output))
        if not self.collecting:
            return
        cost, relay = sensitivity.batch_norm_variance(
            payload, grad_output, grad_input, grad_weight, weight, invstd
        )
        self._report(payload, cost, relay, grad_weight)

    def _report(self, payload, cost, relay, grad_weight):
        power = cost.new_zeros(())
        if grad_weight is not None:
            power = grad_weight.float().square().sum()
        numel = payload.format.size.numel() * self.adds_elements
        self.slot.observe(numel, cost, relay, power, self.producer)


class LayerQuantizer:
    """How one layer keeps its input, and where it reports what it keeps.

    Args:
        bits (float, optional): Bits a code; None keeps the input exactly.
            Valid values are 1 to 8, a mean with ``slot``, and 0 for a layer
            that keeps no tensor.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        generator (RoundingGenerator, optional): Source of random bits.
            Defaults to the one that all unconverted layers share.
        own (OwnSettings, optional): What no level changes but the exact one.
        slot (Slot, optional): Shares out the bits, see
            :class:`mmactnn.AdaptivePrecision`. Defaults to ``bits`` for all.
        chunk_mib (float, optional): Most MiB (2^20 bytes) that a backward
            pass decodes at once, where it can. Defaults to all.
        strict (bool, optional): Whether somebody chose the bits for this very
            layer, so that a payload of fewer bits will not do. Defaults to
            False.
        fused_bits (FusedBits, optional): For a normalisation that is fused.
        cache (PayloadCache, optional): Where the layers of the model find each
            other's payloads. Defaults to the one that all unconverted layers
            share.

    Attributes:
        chunk_bytes (int, optional): ``chunk_mib`` in bytes.
        meter (LayerMeter, optional): Whom the layer tells what it keeps.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid.
    """

    def __init__(
        self,
        bits,
        group_size=ops.DEFAULT_GROUP_SIZE,
        generator=None,
        own=OwnSettings(),  # noqa: B008  (immutable)
        slot=None,
        chunk_mib=None,
        strict=False,
        fused_bits=None,
        cache=None,
    ):
        whole = bits and slot is None
        ops.check_format(bits if whole else 1, group_size)
        self.bits = bits
        self.group_size = group_size
        self.generator = generator or default_generator
        self.own = own
        self.slot = slot
        self.chunk_bytes = None if chunk_mib is None else int(chunk_mib * MIB)
        self.strict = strict
        self.fused_bits = fused_bits
        self.cache = cache or default_cache
        self.meter = None

    @classmethod
    def for_level(
        cls,
        layer_class,
        level,
        group_size,
        generator,
        own,
        name='',
        precision=None,
        rectified=None,
        reads_images=False,
        cache=None,
    ):
        """The settings of a layer in a model of some level.

        A rule of the level goes before what the layer's constructor fixed,
        and that before the level, unless the level is exact throughout.

        Args:
            layer_class (type): Class of the layer, a ``QuantizedLayer``.
            level (Level): Level of the model.
            group_size (int): Elements a range, where the layer fixes none.
            generator (RoundingGenerator, optional): See the class.
            own (OwnSettings): What the layer's constructor fixed.
            name (str, optional): Qualified name of the layer, for the rules.
            precision (AdaptivePrecision, optional): Shares out the bits that
                nothing fixes. Defaults to the level's bits for all, rounded
                down.
            rectified (int, optional): Bits of a rectified value, if the
                layer is a normalisation that is fused, or a ReLU that is with
                the convolution before it; those share out no bits. Defaults
                to None: it is not.
            reads_images (bool, optional): Whether it is a convolution of what
                the level calls images. Defaults to False.
            cache (PayloadCache, optional): See the class.

        Returns:
            LayerQuantizer: The settings.

        Raises:
            ValueError: If bits or group size are not valid.
        """
        bits, slot = layer_class.level_bits(level), None
        rule = level.rule_for(name)
        has_own_bits = rule is not None and rule.sets_bits
        if has_own_bits:
            bits = layer_class.rule_bits(rule)
        elif own.bits is not None and not level.exact:
            bits = own.bits
        elif bits is not None and reads_images and level.image is not None:
            bits = level.image
        elif bits is not None and layer_class.kind != 'mask':
            alone = rectified is None
            if precision is None or not (alone and layer_class.shares_bits):
                bits = int(bits)
            else:
                slot = precision.add(name, bits)
        if bits is not None and slot is None and layer_class.kind != 'mask':
            # Codes have bits; none at all are for layers without codes.
            ops.check_format(bits, group_size)
        sizes = (rule and rule.group_size, own.group_size, group_size)
        group_size = next(size for size in sizes if size is not None)
        strict = bits is not None and (has_own_bits or own.bits is not None)
        fused_bits = None
        if rectified is not None and bits is not None:
            if layer_class.kind == 'mask':
                bits = max(2, rule.bits) if has_own_bits else rectified
            else:
                fused_bits = (
                    FusedBits.of_layer(bits)
                    if strict
                    else FusedBits.of_level(level, rectified)
                )
        return cls(
            bits,
            group_size,
            generator,
            own,
            slot,
            level.chunk_mib,
            strict,
            fused_bits,
            cache,
        )

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

        Raises:
            ValueError, TypeError, RuntimeError: As
                :func:`mmactnn.ops.quantize`.
        """
        if (
            tensor.dtype not in VALID_DTYPES
            or not has_kernels(tensor.device.type)
            or not tensor.dim()
        ):
            check_rows(tensor)
        # The format was checked when it was chosen: from here on ops are
        # called without.
        rows = tensor
        if not tensor.is_contiguous():
            rows = ops.layout.dense_rows(tensor)
        bits, slot, group_size = self.bits, self.slot, self.group_size
        row_bits = row_starts = None
        if slot is not None:
            bits, samples = slot.bits, rows.shape[0]
            if not slot.called:
                bits = slot.bits_of_call
            if samples > 1 and MIN_BITS < bits < MAX_BITS:
                total = round(bits * samples)
                if slot.precision.num_samples is None:
                    spread = torch.ops.mmactnn.row_spread.default(
                        rows, group_size
                    )
                    row_bits, row_starts = (
                        torch.ops.mmactnn.split_bits.default(spread, total)
                    )
                else:
                    row_bits, row_starts, _ = slot.row_bits(rows, group_size)
                bits = total / samples
        seed, offset, count = self.generator.next(rows.device)
        # As signed integers of 64 bits.
        seed -= seed >> 63 << 64
        offset -= offset >> 63 << 64
        if row_bits is None:
            bits = int(bits)
            codes, ranges = torch.ops.mmactnn.quantize.default(
                rows, bits, group_size, seed, offset, count
            )
        else:
            codes, ranges = torch.ops.mmactnn.quantize_rows.default(
                rows,
                row_bits,
                row_starts,
                total,
                group_size,
                seed,
                offset,
                count,
            )
        format = PayloadFormat(
            rows.shape, rows.stride(), rows.dtype, bits, group_size
        )
        return QuantizedTensor(format, codes, ranges, row_bits, row_starts)

    def encoding(self, samples):
        """How an op is to round what :meth:`pack` would.

        Args:
            samples (int): How many samples the tensor has.

        Returns:
            Encoding, optional: None where it takes more than the tensor to
            tell.
        """
        if not self._shares_among(samples):
            return ops.Encoding(
                ops.Kept.PLAIN, self._bits_of_all, self.group_size
            )
        if self.slot.knows_samples(samples):
            return None
        return ops.Encoding(
            ops.Kept.ROWS, self.slot.total_bits(samples), self.group_size
        )

    @property
    def _bits_of_all(self):
        return int(self.bits if self.slot is None else self.slot.bits_of_call)

    def _shares_among(self, samples):
        """Whether samples have bits of their own."""
        slot = self.slot
        return (
            slot is not None
            and samples > 1
            and MIN_BITS < slot.bits_of_call < MAX_BITS
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

    def keep_shared(self, input, tensor, needed):
        """As :meth:`keep`, by the payload that another layer has.

        Fits what is linear in the kept tensor, and the layers that take the
        same one: each of their gradients is unbiased.

        Args:
            input (Tensor[N, *]): The layer's input.
            tensor (Tensor[N, *]): What is to be kept: the input, or a cast or
                padded one.
            needed (bool): Whether the backward pass needs anything.

        Returns:
            tuple[PayloadFormat, tuple[Tensor], Watch]: The first two as
            :meth:`keep`, and what :meth:`watch` returns, for the layer that
            has chosen the bits.
        """
        if not needed:
            return None, (), None
        payload = self.cache.get(input)
        first = payload is None or not self._will_do(payload, tensor)
        if first:
            payload = self.pack(tensor)
            payload.slot = self.slot
            if tensor is input:
                self.cache.put(input, payload)
        watch, slot = None, payload.slot
        if slot is not None:
            precision = slot.precision
            if (
                precision.num_samples is not None
                or tensor.is_cuda
                or not slot.called
            ):
                watch = self.watch_kept(payload, first)
            elif precision.collecting:
                watch = Watch(slot, None, True, first)
        return payload.format, payload.tensors, watch

    def find_shared(self, input, tensor):
        """The payload that another layer has, if it will do.

        Args:
            input (Tensor[N, *]): See :meth:`keep_shared`.
            tensor (Tensor[N, *]): See there.

        Returns:
            Payload, optional: None if there is none that will.
        """
        payload = self.cache.get(input)
        if payload is None or not self._will_do(payload, tensor):
            return None
        return payload

    def _will_do(self, payload, tensor):
        """Whether a payload can stand for a tensor that is to be kept."""
        format = payload.format
        return (
            format.size == tensor.shape
            and format.dtype == tensor.dtype
            and not (self.strict and format.bits < self.bits)
        )

    def hand_out(self, input, tensor, payload):
        """Let other layers find a payload that was made for this one.

        Args:
            input (Tensor[N, *]): See :meth:`keep_shared`.
            tensor (Tensor[N, *]): See there.
            payload (QuantizedTensor): Made of ``tensor``.

        Returns:
            QuantizedTensor: The payload.
        """
        payload.slot = self.slot
        if tensor is input:
            self.cache.put(input, payload)
        return payload

    def watch_kept(self, payload, first):
        """As :meth:`watch`, for a layer that is linear in what it keeps.

        Args:
            payload (Payload): What it keeps ...
            first (bool): ... and whether it was made for this layer.

        Returns:
            Watch, optional: That of the layer that has chosen the bits.
        """
        slot = payload.slot
        if slot is None or not slot.observes:
            return None
        return Watch(slot, None, slot.collecting, first)

    def watch(self, input):
        """Prepare the report of a call, if one is wanted.

        Args:
            input (Tensor[N, *]): The input of a normalisation, whose graph
                tells which layer made it.

        Returns:
            Watch, optional: What the backward pass reports to.
        """
        slot = self.slot
        if slot is None or not slot.observes:
            return None
        producer = getattr(input.grad_fn, 'slot', None)
        return Watch(slot, producer, slot.collecting)

    def note(self, kept, call, also=()):
        """Report to the meter what a call keeps. Only with a meter.

        Args:
            kept (tuple[Tensor]): Tensors that are kept in place of those that
                torch would have kept.
            call (Call): The call, for the rule of the layer's registration.
            also (tuple[Tensor], optional): What torch would have kept for
                other layers that the call stands for. Defaults to nothing.
        """
        self.meter.note(kept, call, also)

    def __deepcopy__(self, memo):
        """A copy with a generator of its own, unless it is the shared one.

        The layers of a copied model share one generator again, the copy, and
        so they do with the precision and the cache.
        """
        twin = copy.copy(self)
        twin.meter = None
        if self.cache is not default_cache:
            twin.cache = copy.deepcopy(self.cache, memo)
        twin.slot = copy.deepcopy(self.slot, memo)
        if self.generator is not default_generator:
            twin.generator = copy.deepcopy(self.generator, memo)
        return twin

    def __getstate__(self):
        """For pickle: what all layers share and the meter stay behind."""
        state = self.__dict__.copy()
        state['meter'] = None
        if self.generator is default_generator:
            state['generator'] = None
        if self.cache is default_cache:
            state['cache'] = None
        return state

    def __setstate__(self, state):
        """Undo :meth:`__getstate__`."""
        self.__dict__.update(state)
        self.generator = self.generator or default_generator
        self.cache = state.get('cache') or default_cache

    def __repr__(self):
        return (
            f'{type(self).__name__}(bits={self.bits}, '
            f'group_size={self.group_size})'
        )
