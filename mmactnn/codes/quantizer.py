"""The settings of one layer."""

import copy
from typing import NamedTuple

import torch

from .. import ops
from ..extension import has_kernels
from ..ops.quantize import VALID_DTYPES, check_rows
from ..ops.rounding import check_rounding
from ..precision import sensitivity
from ..precision.allocation import MAX_BITS, MIN_BITS
from ..random import default_generator
from .cache import default_cache
from .hooks import keep_tensors, top_hooks
from .payload import CentredTensor, PayloadFormat, QuantizedTensor
from .units import MIB


class OwnSettings(NamedTuple):
    """Settings from a layer's own constructor; None follows the level.

    Attributes:
        bits (int, optional): Bits a code.
        group_size (int, optional): Elements a range.
    """

    bits: int | None = None
    group_size: int | None = None


class FusedBits(NamedTuple):
    """Bits of the payloads of a fused normalisation.

    Attributes:
        plain (int): Bits of the normalised value, before an addition or
            alone.
        split (int): Bits of the normalised value where ReLU follows.
        zeroed (int): Bits of a rectified sum.
    """

    plain: int
    split: int
    zeroed: int

    @classmethod
    def of_level(cls, level, rectified):
        """Bits from a level, with those of ``split`` given."""
        zeroed = int(level.norm if level.conv is None else level.conv)
        return cls(int(level.norm), rectified, max(2, zeroed))

    @classmethod
    def of_layer(cls, bits):
        """Bits of a layer that has bits of its own."""
        return cls(bits, min(bits + 1, 8), max(2, bits))


class SensitivityProbe(NamedTuple):
    """Measures in one backward pass how sensitive gradients are to rounding.

    Attributes:
        layer_bits (LayerBits): Receiver of the report.
        producer (LayerBits, optional): Bits of the layer that made the input,
            for a normalisation. (A convolution of a head is called for
            several levels, whose inputs have different producers.)
        collecting (bool): Whether to report the layer; otherwise only the
            gradients of samples.
        adds_elements (bool): Whether the payload belongs to this call, and
            not to another one that has counted its elements.
    """

    layer_bits: object
    producer: object
    collecting: bool
    adds_elements: bool = True

    def linear(self, payload, grad_output, grad_weight, fan):
        """Report a layer whose weight's gradient is linear in its input.

        Args:
            payload (QuantizedTensor): Payload of the input.
            grad_output (Tensor[N, *]): Gradient of the output.
            grad_weight (Tensor[*]): Gradient of the weight.
            fan (float): See :func:`sensitivity.weight_gradient_variance`.
        """
        norms = sensitivity.squared_norms(grad_output)
        self.layer_bits.observe_norms(norms)
        if not self.collecting:
            return
        cost = sensitivity.weight_gradient_variance(payload, norms, fan)
        self._report(payload, cost, cost.new_zeros(()), grad_weight)

    def norm(
        self, payload, grad_output, grad_input, grad_weight, weight, invstd
    ):
        """Report a batch normalisation.

        Args:
            payload (QuantizedTensor): Payload of the input.
            grad_output (Tensor[N, C, *]): Gradient of the output.
            grad_input (Tensor[N, C, *], optional): Gradient of the input;
                None where it is exact.
            grad_weight (Tensor[C], optional): Gradient of the weight.
            weight (Tensor[C], optional): The weight.
            invstd (Tensor[C]): Inverse standard deviations.
        """
        if self.layer_bits.precision.batch_size is not None:
            self.layer_bits.observe_norms(
                sensitivity.squared_norms(grad_output)
            )
        if not self.collecting:
            return
        cost, propagated_variance = sensitivity.batch_norm_variance(
            payload, grad_output, grad_input, grad_weight, weight, invstd
        )
        self._report(payload, cost, propagated_variance, grad_weight)

    def _report(self, payload, cost, propagated_variance, grad_weight):
        grad_sq_norm = cost.new_zeros(())
        if grad_weight is not None:
            grad_sq_norm = grad_weight.float().square().sum()
        numel = payload.format.size.numel() * self.adds_elements
        self.layer_bits.observe(
            numel, cost, propagated_variance, grad_sq_norm, self.producer
        )


class LayerQuantizer:
    """Settings with which one layer quantises the tensors that it keeps.

    Args:
        bits (float, optional): Bits a code; None keeps the input exactly.
            Valid values are 1 to 8 (with ``layer_bits`` a mean, and so any
            number between), and 0 for a layer that keeps no tensor.
        group_size (int, optional): Elements a range. Valid values are 64,
            128, 256 and 512. Defaults to 256.
        generator (RoundingGenerator, optional): Source of random bits.
            Defaults to the one that all unconverted layers share.
        own (OwnSettings, optional): Settings that override those of all
            levels but the exact one.
        layer_bits (LayerBits, optional): Adaptive bits of the layer, see
            :class:`mmactnn.AdaptivePrecision`. Defaults to ``bits``
            throughout.
        chunk_mib (float, optional): Most MiB (2^20 bytes) that a backward
            pass decodes at once, where it can. Defaults to all.
        strict (bool, optional): Whether the bits were chosen for this very
            layer, so that it refuses payloads of fewer bits. Defaults to
            False.
        fused_bits (FusedBits, optional): Bits of a fused normalisation.
        cache (PayloadCache, optional): Payloads that the layers of the model
            share. Defaults to the one of all unconverted layers.
        rounding (str, optional): See :class:`mmactnn.Compression`. Defaults
            to that of levels.
        channel_means (bool, optional): See :class:`mmactnn.Compression`.
            Defaults to False.
        joint_act (bool, optional): See :class:`mmactnn.Compression`. Defaults
            to True.

    Attributes:
        chunk_bytes (int, optional): ``chunk_mib`` in bytes.
        meter (LayerMeter, optional): Counter of kept tensors, while they are
            measured.

    Raises:
        ValueError: If ``bits`` or ``group_size`` is not valid, or there are
            no codes for ``rounding`` and ``group_size``.
    """

    def __init__(
        self,
        bits,
        group_size=ops.DEFAULT_GROUP_SIZE,
        generator=None,
        own=OwnSettings(),  # noqa: B008  (immutable)
        layer_bits=None,
        chunk_mib=None,
        strict=False,
        fused_bits=None,
        cache=None,
        rounding=ops.DEFAULT_ROUNDING,
        channel_means=False,
        joint_act=True,
    ):
        whole = bits and layer_bits is None
        ops.check_format(bits if whole else 1, group_size)
        if bits is not None:
            check_rounding(rounding, group_size)
        self.bits = bits
        self.group_size = group_size
        self.generator = generator or default_generator
        self.own = own
        self.layer_bits = layer_bits
        self.chunk_bytes = None if chunk_mib is None else int(chunk_mib * MIB)
        self.strict = strict
        self.fused_bits = fused_bits
        self.cache = cache or default_cache
        self.rounding = rounding
        self.channel_means = channel_means
        self.joint_act = joint_act
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
        """Settings of a layer in a model that is converted at a level.

        A rule of the level overrides the layer's own settings. These override
        the level's, except at exact levels.

        Args:
            layer_class (type): Class of the layer, a ``QuantizedLayer``.
            level (Level): Level of the model.
            group_size (int): Elements a range, where the layer fixes none.
            generator (RoundingGenerator, optional): See the class.
            own (OwnSettings): Settings from the layer's constructor.
            name (str, optional): Qualified name of the layer, for the rules.
            precision (AdaptivePrecision, optional): Allocates bits that
                neither a rule nor the layer fixes. Defaults to the level's
                bits for all, rounded down.
            rectified (int, optional): Bits of a rectified value, for a
                normalisation in a fused block or a ReLU that is fused with
                the convolution before it; their bits are not adaptive.
                Defaults to None: the layer is not fused.
            reads_images (bool, optional): Whether the layer is a convolution
                that reads images, see :class:`Level`. Defaults to False.
            cache (PayloadCache, optional): See the class.

        Returns:
            LayerQuantizer: The settings.

        Raises:
            ValueError: If bits or group size are not valid, or there are no
                codes for the level's rounding and the group size.
        """
        bits, layer_bits = layer_class.level_bits(level), None
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
                layer_bits = precision.add(name, bits)
        if (
            bits is not None
            and layer_bits is None
            and layer_class.kind != 'mask'
        ):
            # 0 bits are for layers without codes, and no valid format.
            ops.check_format(bits, group_size)
        sizes = (rule and rule.group_size, own.group_size, group_size)
        group_size = next(size for size in sizes if size is not None)
        if bits is not None:
            check_rounding(level.rounding, group_size, f' of layer {name!r}')
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
            layer_bits,
            level.chunk_mib,
            strict,
            fused_bits,
            cache,
            level.rounding,
            level.channel_means,
            level.joint_act,
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
        # The format was checked when it was chosen. Calls of the registered
        # ops check nothing again, and save time on the host.
        rows = tensor
        if not tensor.is_contiguous():
            rows = ops.layout.dense_rows(tensor)
        bits, layer_bits, group_size = (
            self.bits,
            self.layer_bits,
            self.group_size,
        )
        row_bits = row_starts = None
        if layer_bits is not None:
            bits, samples = layer_bits.bits, rows.shape[0]
            if not layer_bits.called:
                bits = layer_bits.bits_of_call
            if samples > 1 and MIN_BITS < bits < MAX_BITS:
                total = round(bits * samples)
                if layer_bits.precision.num_samples is None:
                    energies = torch.ops.mmactnn.sample_range_energy.default(
                        rows, group_size
                    )
                    row_bits, row_starts = (
                        torch.ops.mmactnn.allocate_sample_bits.default(
                            energies, total
                        )
                    )
                else:
                    row_bits, row_starts, _ = layer_bits.row_bits(
                        rows, group_size
                    )
                bits = total / samples
        draw = self.generator.next(rows.device)
        seed, offset, offset_tensor = draw
        # As signed integers of 64 bits.
        seed -= seed >> 63 << 64
        offset -= offset >> 63 << 64
        rotated = self.rounding == 'rotated'
        if row_bits is None:
            bits = int(bits)
            codes, ranges = torch.ops.mmactnn.quantize.default(
                rows, bits, group_size, seed, offset, offset_tensor, rotated
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
                offset_tensor,
                rotated,
            )
        drawn = None
        if self.rounding != 'stochastic':
            # As drawn_bits(), without its calls.
            drawn = ops.DrawnBits(seed, offset, offset_tensor, 0, rotated)
        format = PayloadFormat(
            rows.shape,
            rows.stride(),
            rows.dtype,
            bits,
            group_size,
            drawn=drawn,
            # A call less where there are no hooks, which is nearly always.
            saves_bits=drawn is not None
            and top_hooks(True) is not None
            and not keep_tensors(),
        )
        return QuantizedTensor(format, codes, ranges, row_bits, row_starts)

    def random(self, draw):
        """Arguments of ops that round as :meth:`pack` does.

        Args:
            draw (Draw): Seed and offset.

        Returns:
            dict: Keyword arguments of :func:`mmactnn.ops.quantize`.
        """
        return dict(draw._asdict(), rotated=self.rounding == 'rotated')

    def drawn_bits(self, draw):
        """Random bits that the payloads of a draw are decoded with.

        Args:
            draw (Draw): Seed and offset that they were rounded with.

        Returns:
            DrawnBits, optional: None where codes alone are decoded.
        """
        return ops.DrawnBits.of(self.rounding, *draw)

    def encoding(self, samples):
        """Format with which an op encodes a tensor as :meth:`pack` would.

        Args:
            samples (int): Number of samples of the tensor.

        Returns:
            Encoding, optional: None if the bits of samples depend on their
            gradients, which ops do not know.
        """
        if not self._shares_among(samples):
            return ops.Encoding(
                ops.PayloadKind.PLAIN, self._bits_of_all, self.group_size
            )
        if self.layer_bits.knows_samples(samples):
            return None
        return ops.Encoding(
            ops.PayloadKind.ROWS,
            self.layer_bits.total_bits(samples),
            self.group_size,
        )

    @property
    def _bits_of_all(self):
        return int(
            self.bits
            if self.layer_bits is None
            else self.layer_bits.bits_of_call
        )

    def _shares_among(self, samples):
        """Whether each sample has bits of its own."""
        layer_bits = self.layer_bits
        return (
            layer_bits is not None
            and samples > 1
            and MIN_BITS < layer_bits.bits_of_call < MAX_BITS
        )

    def keep(self, tensor, needed):
        """Quantise the input of a layer for its backward pass.

        Args:
            tensor (Tensor[N, *]): float32, float16 or bfloat16.
            needed (bool): Whether the backward pass needs it.

        Returns:
            tuple[PayloadFormat, tuple[Tensor]]: Format, for ``ctx``, and
            tensors, for ``ctx.save_for_backward``; None and () if not
            ``needed``.
        """
        if not needed:
            return None, ()
        payload = self.pack(tensor)
        return payload.format, payload.tensors

    def keep_shared(self, input, tensor, needed, channels_last=False):
        """As :meth:`keep`, but reuses the payload of another layer.

        For gradients that are linear in the kept tensor: each of the layers
        that share a payload then has an unbiased gradient.

        Args:
            input (Tensor[N, *]): The layer's input.
            tensor (Tensor[N, *]): Tensor to keep: the input, cast or padded
                where the layer does so.
            needed (bool): Whether the backward pass needs it.
            channels_last (bool, optional): Whether the last dimension of the
                tensor is that of channels, whose means can be kept. Defaults
                to False.

        Returns:
            tuple[PayloadFormat, tuple[Tensor], SensitivityProbe | None]:
            Format and tensors as from :meth:`keep`; the probe as from
            :meth:`probe_linear`.
        """
        if not needed:
            return None, (), None
        payload = self.cache.get(input)
        first = payload is None or not self._will_do(payload, tensor)
        if first:
            if channels_last and self.channel_means:
                payload = CentredTensor.pack(tensor, self.pack)
            else:
                payload = self.pack(tensor)
            payload.layer_bits = self.layer_bits
            if tensor is input:
                self.cache.put(input, payload)
        probe, layer_bits = None, payload.layer_bits
        if layer_bits is not None:
            precision = layer_bits.precision
            if (
                precision.num_samples is not None
                or tensor.is_cuda
                or not layer_bits.called
            ):
                probe = self.probe_linear(payload, first)
            elif precision.collecting:
                probe = SensitivityProbe(layer_bits, None, True, first)
        return payload.format, payload.tensors, probe

    def find_shared(self, input, tensor):
        """Find a payload of another layer that this one can use.

        Args:
            input (Tensor[N, *]): See :meth:`keep_shared`.
            tensor (Tensor[N, *]): See there.

        Returns:
            Payload, optional: None if there is none that an op decodes.
        """
        payload = self.cache.get(input)
        if payload is None or not self._will_do(payload, tensor):
            return None
        return payload if payload.of_codes_alone else None

    def _will_do(self, payload, tensor):
        """Whether a payload can stand for a tensor that is to be kept."""
        format = payload.format
        return (
            format.size == tensor.shape
            and format.dtype == tensor.dtype
            and not (self.strict and format.bits < self.bits)
        )

    def publish(self, input, tensor, payload):
        """Put a payload that was made for this layer into the cache.

        Args:
            input (Tensor[N, *]): See :meth:`keep_shared`.
            tensor (Tensor[N, *]): See there.
            payload (QuantizedTensor): Payload of ``tensor``.

        Returns:
            QuantizedTensor: The payload.
        """
        payload.layer_bits = self.layer_bits
        if tensor is input:
            self.cache.put(input, payload)
        return payload

    def probe_linear(self, payload, first):
        """Make the probe of a call whose gradient is linear in its payload.

        Args:
            payload (Payload): Payload of the input.
            first (bool): Whether the payload was made for this call.

        Returns:
            SensitivityProbe, optional: Reports to the layer that chose the
            bits of the payload; None if no report is wanted.
        """
        layer_bits = payload.layer_bits
        if layer_bits is None or not layer_bits.observes:
            return None
        return SensitivityProbe(layer_bits, None, layer_bits.collecting, first)

    def probe_norm(self, input):
        """Make the probe of a call of a normalisation.

        Args:
            input (Tensor[N, *]): The input, whose autograd node tells which
                layer made it.

        Returns:
            SensitivityProbe, optional: Reports to this layer; None if no
            report is wanted.
        """
        layer_bits = self.layer_bits
        if layer_bits is None or not layer_bits.observes:
            return None
        producer = getattr(input.grad_fn, 'layer_bits', None)
        return SensitivityProbe(layer_bits, producer, layer_bits.collecting)

    def record(self, kept, call, also=()):
        """Record the tensors that a call keeps, for a meter.

        Callers check that there is a meter.

        Args:
            kept (tuple[Tensor | None]): Tensors that the call keeps in place
                of those that torch would have kept.
            call (Call): The call, from which the layer's registered rule
                tells the tensors that torch would have kept.
            also (tuple[Tensor], optional): Tensors that torch would have kept
                for other layers that are fused into the call. Defaults to
                none.
        """
        # A payload may lack the parameters of a normalisation.
        kept = tuple(tensor for tensor in kept if tensor is not None)
        self.meter.record(kept, call, also)

    def __deepcopy__(self, memo):
        """A copy with a generator of its own, unless it is the shared one.

        The layers of a copied model share one generator again, the copy, and
        so they do with the precision and the cache.
        """
        twin = copy.copy(self)
        twin.meter = None
        if self.cache is not default_cache:
            twin.cache = copy.deepcopy(self.cache, memo)
        twin.layer_bits = copy.deepcopy(self.layer_bits, memo)
        if self.generator is not default_generator:
            twin.generator = copy.deepcopy(self.generator, memo)
        return twin

    def __getstate__(self):
        """For pickle: without the meter and the shared defaults."""
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
        # A pickle from before there was a choice.
        self.rounding = state.get('rounding', 'stochastic')
        self.channel_means = state.get('channel_means', False)
        self.joint_act = state.get('joint_act', False)

    def __repr__(self):
        return (
            f'{type(self).__name__}(bits={self.bits}, '
            f'group_size={self.group_size})'
        )
