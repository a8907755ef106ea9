"""Softmax attention that keeps queries, keys and values as codes.

The backward pass decodes all three once and differentiates the whole of the
attention again. Probabilities, their row sums and the product of output and
gradient then come from the same decoded values, so that what cancels in the
gradient of a softmax still cancels. Codes of probabilities, or an exact
logsumexp or output beside decoded queries and keys, would destroy that.
"""

import contextlib
import math
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.backends import cuda

from ..codes.calls import Call
from ..codes.hooks import top_hooks
from ..codes.moved import move_exactly
from ..codes.payload import WHOLE, CentredTensor, pieces
from ..ops.capture import is_capturing
from ..ops.quantize import VALID_DTYPES
from .autocast import cast, lower_dtype
from .double_backward import first_order_only
from .placeholders import meta_tensor
from .score_terms import keep_term, restore_term

# Tokens from which on a mean in float32 is little beside a channel's codes.
_MIN_TOKENS_FOR_MEANS = 64


class FusedCore(NamedTuple):
    """``F.scaled_dot_product_attention`` as the computation to repeat.

    Attributes:
        dropout_p (float): Probability to drop a weight.
        is_causal (bool): See torch.
        scale (float, optional): See torch.
        enable_gqa (bool): See torch.
        is_explicit (bool): Whether it stands for separate calls, of which
            torch keeps the weights.
    """

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    is_explicit: bool = False

    def __call__(self, query, key, value, bias):
        """Compute the output.

        Args:
            query (Tensor[N, *, L, D]): Queries.
            key (Tensor[N, *, S, D]): Keys.
            value (Tensor[N, *, S, E]): Values.
            bias (Tensor[*], optional): Mask or summand of the scores.

        Returns:
            tuple[Tensor[N, *, L, E]]: The output.
        """
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            bias,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )
        return (output,)

    def saved_by_torch(self, query, key, value, terms, outputs):
        """Tensors that torch would keep, by the kernels that keep least.

        Args:
            query (Tensor[N, *, L, D]): Queries.
            key (Tensor[N, *, S, D]): Keys.
            value (Tensor[N, *, S, E]): Values.
            terms (Sequence[Tensor[*]]): Masks and summands of the scores.
            outputs (tuple[Tensor]): The outputs.

        Returns:
            tuple[Tensor]: The tensors.
        """
        if self.is_explicit:
            # Matrix products read copies of all three.
            copies = (meta_tensor(x.shape, x.dtype) for x in (key, value))
            return _kept_with_weights(query, *copies, self.dropout_p)
        logsumexp = meta_tensor(query.shape[:-1], torch.float32)
        return query, key, value, *terms, *outputs, logsumexp


class ExplicitCore(NamedTuple):
    """Attention with its weights, as ``nn.MultiheadAttention`` computes it.

    Attributes:
        dropout_p (float): Probability to drop a weight.
        average (bool): Whether the weights are averaged over heads.
    """

    dropout_p: float = 0.0
    average: bool = True

    def __call__(self, query, key, value, bias):
        """Compute output and weights.

        Args:
            query (Tensor[N, H, L, D]): Queries.
            key (Tensor[N, H, S, D]): Keys.
            value (Tensor[N, H, S, D]): Values.
            bias (Tensor[*], optional): Summand of the scores.

        Returns:
            tuple[Tensor[N, H, L, D], Tensor[N, L, S] | Tensor[N, H, L, S]]:
            Output and weights.
        """
        samples, heads, length, channels = query.shape
        shape = samples, heads, length, key.shape[-2]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        query = query * math.sqrt(1.0 / float(channels))
        if bias is None:
            weights = torch.bmm(query, key.transpose(-2, -1))
        else:
            bias = bias.expand(-1, heads, -1, -1) if bias.dim() > 2 else bias
            bias = bias.reshape(-1, *bias.shape[-2:])
            if bias.shape[0] == heads:
                bias = bias.repeat(samples, 1, 1)
            weights = torch.baddbmm(bias, query, key.transpose(-2, -1))
        weights = F.softmax(weights, dim=-1)
        if self.dropout_p > 0.0:
            weights = F.dropout(weights, p=self.dropout_p)
        output = torch.bmm(weights, value)
        output = output.view(samples, heads, length, value.shape[-1])
        weights = weights.view(shape)
        return output, weights.mean(dim=1) if self.average else weights

    def saved_by_torch(self, query, key, value, terms, outputs):
        """Tensors that torch would keep; see :class:`FusedCore`."""
        return _kept_with_weights(query, key, value, self.dropout_p)


def _kept_with_weights(query, key, value, dropout_p):
    """Tensors that torch keeps of attention in separate calls."""
    shape = *query.shape[:-1], key.shape[-2]
    weights = [meta_tensor(shape, query.dtype)]
    if dropout_p > 0.0:
        dtypes = query.dtype, torch.bool
        weights += [meta_tensor(shape, dtype) for dtype in dtypes]
    # Queries times their scale.
    return meta_tensor(query.shape, query.dtype), key, value, *weights


class Biases(NamedTuple):
    """Form of the tensors that are added to the scores.

    Attributes:
        count (int): Number of the tensors.
        hides (bool): Whether True in a tensor of bools hides a key, as in
            ``nn.MultiheadAttention``. Otherwise a single tensor goes to the
            core as it is.
        period (int): Number of samples after which biases repeat; 1 if those
            of all samples are given, or are the same.
    """

    count: int = 0
    hides: bool = False
    period: int = 1

    def of_part(self, tensors, part, samples, dtype, dims):
        """Bias of a range of samples.

        Args:
            tensors (Sequence[Tensor[*]]): The tensors.
            part (slice): The samples, or ``WHOLE``.
            samples (int): Number of all samples.
            dtype (torch.dtype): Dtype of the scores.
            dims (int): Number of dimensions of the scores.

        Returns:
            Tensor[*], optional: Their sum; None if there are none.
        """
        terms = []
        for tensor in tensors:
            if tensor.dim() == dims and tensor.shape[0] == samples > 1:
                tensor = tensor[part]
            if self.hides and tensor.dtype is torch.bool:
                tensor = torch.zeros_like(tensor, dtype=dtype).masked_fill_(
                    tensor, -math.inf
                )
            terms.append(tensor)
        if not terms:
            return None
        total = sum(terms[1:], terms[0])
        if self.period == 1:
            return total
        start, stop, _ = part.indices(samples)
        repeats = (stop - start) // self.period
        total = total.expand(repeats, *total.shape)
        return total.reshape(-1, *total.shape[2:])


class Replay(NamedTuple):
    """State of torch on which a computation depends besides its arguments.

    Attributes:
        device (str): Type of the device.
        autocast (tuple): Whether autocast is on, and its dtype.
        kernels (tuple): Kernels of attention that are allowed, and their
            order of preference.
    """

    device: str
    autocast: tuple
    kernels: tuple

    @classmethod
    def now(cls, device):
        """The present state."""
        return cls(device, _autocast(device), _allowed_kernels())

    @contextlib.contextmanager
    def restored(self):
        """Context with this state, in which gradients are recorded."""
        before = _allowed_kernels()
        enabled, dtype = self.autocast
        autocast = contextlib.nullcontext()
        if _autocast(self.device) != self.autocast:
            autocast = torch.autocast(
                self.device, dtype=dtype, enabled=enabled
            )
        with torch.enable_grad(), autocast:
            if before == self.kernels:
                yield
                return
            _allow(self.kernels)
            try:
                yield
            finally:
                _allow(before)


def _autocast(device):
    enabled = torch.is_autocast_enabled(device)
    return enabled, torch.get_autocast_dtype(device)


def _allowed_kernels():
    allowed = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    return allowed, tuple(torch._C._get_sdp_priority_order())


def _allow(kernels):
    (flash, mem_efficient, math_kernel, cudnn), order = kernels
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(mem_efficient)
    cuda.enable_math_sdp(math_kernel)
    cuda.enable_cudnn_sdp(cudnn)
    torch._C._set_sdp_priority_order(list(order))


class _Attention(Function):
    @staticmethod
    def forward(ctx, core, biases, quantizer, query, key, value, *terms):
        tensors = query, key, value
        needs = ctx.needs_input_grad[3:]
        ctx.set_materialize_grads(False)
        ctx.core, ctx.biases = core, biases
        ctx.replay = Replay.now(query.device.type)
        ctx.samples, ctx.dims = query.shape[0], query.dim()
        ctx.dtype = query.dtype
        ctx.has_state = core.dropout_p > 0.0
        state = [_random_state(query.device)] if ctx.has_state else []
        budget = quantizer.chunk_bytes
        ctx.parts = _parts(tensors, terms, needs, biases, budget)
        whole = biases.period == 1
        parts = [WHOLE] if whole else ctx.parts
        if whole and ctx.has_state:
            # Pieces would have other random numbers.
            ctx.parts = parts
        outputs = _run(ctx, core, parts, tensors, terms, needs)

        bits = quantizer.attention_bits
        ctx.groups, kept = [], []
        for places, group_bits in _groups(tensors, bits):
            group, codes = _encode(tensors, places, group_bits, quantizer)
            ctx.groups.append(group)
            kept += codes
        ctx.terms, kept_terms = [], []
        for term in terms:
            format, saved = keep_term(term, quantizer.cache)
            ctx.terms.append((format, len(saved)))
            kept_terms += saved
        ctx.save_for_backward(*kept, *kept_terms, *state)
        ctx.num_coded = len(kept)
        ctx.source = weakref.ref(query)
        if quantizer.meter is not None:
            exact = core.saved_by_torch(query, key, value, terms, outputs)
            quantizer.record((*kept, *kept_terms), Call(), exact)
        return outputs

    @staticmethod
    @first_order_only('Attention')
    def backward(ctx, *grad_outputs):
        saved = list(ctx.saved_tensors)
        state = saved.pop() if ctx.has_state else None
        needs = ctx.needs_input_grad[3:]
        kept, rest = saved[: ctx.num_coded], saved[ctx.num_coded :]
        terms = []
        for format, count in ctx.terms:
            terms.append(restore_term(format, rest[:count]))
            rest = rest[count:]
        totals = [None] * len(needs)
        with _random_numbers(state, grad_outputs):
            for part in ctx.parts:
                grads = _differentiate(ctx, kept, terms, part, grad_outputs)
                for i, grad in enumerate(grads):
                    if grad is not None:
                        _accumulate(ctx, totals, i, grad, part, terms)
        return None, None, None, *totals


def _run(ctx, core, parts, tensors, terms, needs):
    """Outputs of all samples, by the kernels that gradients ask for."""
    pieces_of = []
    for part in parts:
        with torch.enable_grad(), without_hooks():
            leaves = [
                x.detach().requires_grad_(needed)
                for x, needed in zip((*tensors, *terms), needs)
            ]
            query, key, value = leaves[:3]
            if part is not WHOLE:
                query, key, value = query[part], key[part], value[part]
            bias = ctx.biases.of_part(
                leaves[3:], part, ctx.samples, ctx.dtype, ctx.dims
            )
            outputs = core(query, key, value, bias)
        pieces_of.append([output.detach() for output in outputs])
    if len(pieces_of) == 1:
        return tuple(pieces_of[0])
    return tuple(map(_joined, zip(*pieces_of)))


def _joined(parts):
    """Concatenation along the first dimension, in the layout of the parts."""
    if parts[0].dim() < 4 or not parts[0].transpose(1, 2).is_contiguous():
        return torch.cat(parts)
    return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)


def _differentiate(ctx, kept, terms, part, grad_outputs):
    """Gradients of a range of samples, and of all biases."""
    needs = ctx.needs_input_grad[3:]
    leaves = [None] * 3
    start = 0
    for group in ctx.groups:
        stop = start + group.num_tensors
        for place, x in group.decode(kept[start:stop], part):
            leaves[place] = x
        start = stop
    leaves += [term.detach() for term in terms]
    for leaf, needed in zip(leaves, needs):
        leaf.requires_grad_(needed)
    with ctx.replay.restored(), without_hooks():
        bias = ctx.biases.of_part(
            leaves[3:], part, ctx.samples, ctx.dtype, ctx.dims
        )
        outputs = ctx.core(*leaves[:3], bias)
        pairs = [
            (output, grad if part is WHOLE else grad[part])
            for output, grad in zip(outputs, grad_outputs)
            if grad is not None
        ]
        wanted = [leaf for leaf, needed in zip(leaves, needs) if needed]
        outputs, grads = zip(*pairs)
        found = iter(
            torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        )
    return [next(found) if needed else None for needed in needs]


def _accumulate(ctx, totals, i, grad, part, terms):
    """Add the gradient of a range of samples to that of an argument."""
    if part is WHOLE or (i >= 3 and totals[i] is None):
        totals[i] = grad
    elif i >= 3:
        totals[i] += grad
    else:
        if totals[i] is None:
            totals[i] = _empty_for_all(grad, ctx.samples)
        totals[i][part] = grad


def _empty_for_all(part, samples):
    """Memory for all samples, in the layout of those of a part."""
    inner = part.movedim(-2, 1)
    if inner.is_contiguous():
        whole = inner.new_empty((samples, *inner.shape[1:]))
        return whole.movedim(1, -2)
    return part.new_empty((samples, *part.shape[1:]))


def _parts(tensors, terms, needs, biases, budget):
    """Ranges of samples that the backward pass processes by themselves."""
    query, key, _ = tensors
    samples = query.shape[0]
    nbytes = sum(x.nbytes for x in tensors)
    if biases.period > 1 or any(needs[3:]):
        # Biases, or their gradients, are as large as the scores.
        scores = query.shape[:-1].numel() * key.shape[-2]
        nbytes += scores * query.dtype.itemsize
    groups = samples // biases.period
    parts = []
    for part in pieces(groups, nbytes, budget):
        if part is WHOLE:
            return [WHOLE]
        start, stop, _ = part.indices(groups)
        parts.append(slice(start * biases.period, stop * biases.period))
    return parts


class _Group(NamedTuple):
    """Tensors that are coded together.

    Attributes:
        format (PayloadFormat): Format of their payload.
        num_tensors (int): Number of the payload's tensors.
        places (tuple[int]): Places of the tensors among query, key and value.
        inner (tuple[int]): Sizes of the dimensions behind the tokens.
    """

    format: object
    num_tensors: int
    places: tuple
    inner: tuple

    def decode(self, tensors, part):
        """Yield place and values of each tensor, for a range of samples."""
        payload = self.format.payload(*tensors)
        rows = payload.unpack(part.start, part.stop)
        rows = rows.view(*rows.shape[:2], len(self.places), *self.inner)
        for place, x in zip(self.places, rows.unbind(2)):
            yield place, x.movedim(1, -2).detach()


def _groups(tensors, bits):
    """Places of the tensors to be coded together, and their bits."""
    query, key, value = tensors
    shares = _distance(query, key) is not None
    if shares and bits.query_key == bits.value:
        distance = _distance(query, key)
        if _distance(key, value) == distance:
            return [((0, 1, 2), bits.value)]
    if shares:
        return [((0, 1), bits.query_key), ((2,), bits.value)]
    return [
        ((0,), bits.query_key),
        ((1,), bits.query_key),
        ((2,), bits.value),
    ]


def _distance(first, second):
    """Elements from a tensor to another one in the same memory.

    Returns:
        int, optional: None if they have no such place, or other layouts.
    """
    distance = second.storage_offset() - first.storage_offset()
    if (
        first.shape != second.shape
        or first.stride() != second.stride()
        or first.untyped_storage()._cdata != second.untyped_storage()._cdata
        or distance <= 0
    ):
        return None
    return distance


def _encode(tensors, places, bits, quantizer):
    """Code one tensor, or several as one that lie in the same memory.

    Rows are samples, and channels come last: all heads of a token together.

    Returns:
        tuple[_Group, tuple[Tensor]]: Group and tensors of its payload.
    """
    x = tensors[places[0]].detach().movedim(-2, 1)
    inner = tuple(x.shape[2:])
    if len(places) > 1:
        distance = _distance(*(tensors[place] for place in places[:2]))
        x = x.as_strided(
            (*x.shape[:2], len(places), *inner),
            (*x.stride()[:2], distance, *x.stride()[2:]),
        )
    rows = x.flatten(2)
    pack = quantizer.at_bits(bits).pack
    tokens = rows.shape[0] * rows.shape[1]
    # Values enter linearly: their means are worth no further pass.
    if tokens >= _MIN_TOKENS_FOR_MEANS and places != (2,):
        payload = CentredTensor.pack(rows, pack)
    else:
        payload = pack(rows)
    kept = payload.tensors
    return _Group(payload.format, len(kept), places, inner), kept


@contextlib.contextmanager
def without_hooks():
    """Context in which tensors are saved for a moment only."""
    if top_hooks(True) is None:
        yield
        return
    # Detached: an output that its own node saves would own that node.
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _same):
        yield


def _same(tensor):
    return tensor


def _random_state(device):
    if device.type == 'cpu':
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


@contextlib.contextmanager
def _random_numbers(state, grad_outputs):
    """Context with the random numbers of the forward pass."""
    if state is None:
        yield
        return
    device = next(g for g in grad_outputs if g is not None).device
    devices = [] if device.type == 'cpu' else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        if device.type == 'cpu':
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
        yield


def can_code_attention(query, key, value, dropout_p=0.0):
    """Whether queries, keys and values can be kept as codes.

    Args:
        query (Tensor[*, L, D]): Queries.
        key (Tensor[*, S, D]): Keys.
        value (Tensor[*, S, E]): Values.
        dropout_p (float, optional): Probability to drop a weight. Defaults
            to 0.

    Returns:
        bool: False for fewer than three dimensions, empty tensors, dtypes
        without codes, and for dropout while a CUDA graph is captured, which
        repeats random numbers only within its own kernels.
    """
    tensors = query, key, value
    return (
        all(x.dim() == query.dim() >= 3 for x in tensors)
        and all(x.dtype in VALID_DTYPES for x in tensors)
        and all(x.shape[0] == query.shape[0] and x.numel() for x in tensors)
        and not (dropout_p > 0.0 and query.is_cuda and is_capturing())
    )


def attention(
    query,
    key,
    value,
    quantizer,
    terms=(),
    core=FusedCore(),  # noqa: B008  (immutable)
    hides=False,
    period=1,
):
    """Softmax attention whose gradients come from codes.

    The forward pass is that of ``core``. Biases are kept as they are, small
    where they are expanded; queries, keys and values as codes with
    ``quantizer.attention_bits``. The backward pass runs ``core`` again on the
    decoded values, by the same kernels and, for dropout, with the same random
    numbers, a number of samples at a time (``chunk_mib``) unless there is
    dropout. The gradient is that of one softmax. It is linear in the values,
    hence unbiased but for the errors of queries and keys, see
    :class:`mmactnn.Compression`.

    Args:
        query (Tensor[N, *, L, D]): Queries: float32, float16 or bfloat16.
        key (Tensor[N, *, S, D]): Keys.
        value (Tensor[N, *, S, E]): Values.
        quantizer (LayerQuantizer): Settings, with ``attention_bits``.
        terms (Sequence[Tensor[*]], optional): Mask, or summands of the
            scores, which broadcast to these; of bools only one, unless they
            hide. A term with a gradient that is an expanded tensor has one of
            its expanded size for a moment.
        core (FusedCore | ExplicitCore, optional): The computation. Defaults
            to torch's function.
        hides (bool, optional): See :class:`Biases`.
        period (int, optional): See :class:`Biases`.

    Returns:
        Tensor[N, *, L, E] | tuple[Tensor]: The output; for an
        :class:`ExplicitCore` output and weights.
    """
    dtype = lower_dtype(query)
    if dtype is not None:
        query, key, value = cast(dtype, query, key, value)
        terms = [
            move_exactly(quantizer.cache, torch.Tensor.to, t, dtype)
            if t.is_floating_point()
            else t
            for t in terms
        ]
    biases = Biases(len(terms), hides, period)
    outputs = _Attention.apply(
        core, biases, quantizer, query, key, value, *terms
    )
    return outputs[0] if isinstance(core, FusedCore) else outputs


def dot_product_attention(
    quantizer,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """``F.scaled_dot_product_attention`` whose gradients come from codes.

    Args:
        quantizer (LayerQuantizer): Settings, with ``attention_bits``.
        query (Tensor[*, L, D]): See torch, as for all of the following.
        key (Tensor[*, S, D]): Keys.
        value (Tensor[*, S, E]): Values.
        attn_mask (Tensor[*], optional): Mask or summand.
        dropout_p (float, optional): Defaults to 0.
        is_causal (bool, optional): Defaults to False.
        scale (float, optional): Defaults to that of torch.
        enable_gqa (bool, optional): Defaults to False.

    Returns:
        Tensor[*, L, E]: The output; torch's where :func:`can_code_attention`
        is False.
    """
    core = FusedCore(dropout_p, is_causal, scale, enable_gqa)
    if not can_code_attention(query, key, value, dropout_p):
        return core(query, key, value, attn_mask)[0]
    terms = () if attn_mask is None else (attn_mask,)
    return attention(query, key, value, quantizer, terms, core)
