"""Compressed attention."""

import torch
import torch.nn.functional as F
from torch import nn

from ..autograd import (
    ExplicitCore,
    FusedCore,
    attention,
    can_code_attention,
    dot_product_attention,
    linear,
)
from ..modules.execution import is_observed
from ..modules.function_mode import active_mode
from ..registry import register_layer
from .base import CodedLayer
from .gateway import keeps_codes, run
from .linear import QLinear


class ScaledDotProductAttention(nn.Module):
    """``F.scaled_dot_product_attention`` as a layer, which torch lacks."""

    def forward(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        """Attend; see torch for the arguments.

        Args:
            query (Tensor[*, L, D]): Queries.
            key (Tensor[*, S, D]): Keys.
            value (Tensor[*, S, E]): Values.
            attn_mask (Tensor[*], optional): Mask or summand of the scores.
            dropout_p (float, optional): Defaults to 0.
            is_causal (bool, optional): Defaults to False.
            scale (float, optional): Defaults to that of torch.
            enable_gqa (bool, optional): Defaults to False.

        Returns:
            Tensor[*, L, E]: The output.
        """
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


@register_layer(
    ScaledDotProductAttention,
    # Its tensors are recorded one by one, for they depend on the kernels.
    saved_by_torch=lambda call: (),
)
class QScaledDotProductAttention(CodedLayer, ScaledDotProductAttention):
    """Attention that keeps queries, keys and values as codes of a few bits.

    The backward pass decodes them once, and computes one consistent softmax
    again by the kernels of the forward pass, whose output is exact. A mask or
    bias is kept as it is. In eval mode, without grad and at level L0 it is
    ``F.scaled_dot_product_attention``.

    Args:
        bits (int, optional): Bits an element of queries, keys and values at
            every level but L0. Valid values are 1 to 8. Defaults to the
            level's for attention.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8, requires_grad=True)
        >>> QScaledDotProductAttention()(q, k, v).sum().backward()
    """

    kind = 'attention'
    shares_bits = False

    def forward(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        """See :class:`ScaledDotProductAttention`."""
        options = attn_mask, dropout_p, is_causal, scale, enable_gqa
        return run(
            self,
            ScaledDotProductAttention.forward,
            QScaledDotProductAttention._compress,
            (query, key, value, *options),
            (key, value, attn_mask),
        )

    def _compress(self, *args):
        return dot_product_attention(self.quantizer, *args)


@register_layer(
    nn.MultiheadAttention,
    # Tensors of the attention itself are recorded one by one.
    saved_by_torch=lambda call: (
        call.input if call.needs_weight else None,
        call.weight if call.needs_input else None,
    ),
)
class QMultiheadAttention(CodedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that keeps codes of all that it reads.

    Inputs of the projections are kept as those of :class:`QLinear`, one
    payload for queries, keys and values that are one tensor. Queries, keys
    and values are kept as codes, and their scores computed again by the
    backward pass, which decodes them once. Masks are kept as they are given.

    With ``need_weights=False`` torch's fused kernels compute both passes, and
    so they do for a module that reads ``self.attn(...)[0]`` alone and drops
    the weights, as MMCV's ``MultiheadAttention`` does (weights are None
    then). Otherwise the layer computes as ``nn.MultiheadAttention``, which
    needs memory for the weights for a moment in both passes, and none between
    them; gradients through weights, averaged or not, are right.

    The output is that of ``nn.MultiheadAttention`` except for the last bits,
    where inputs are batch first or are projected together. In eval mode,
    without grad and at level L0 it is ``nn.MultiheadAttention``.

    Args:
        *args: As ``nn.MultiheadAttention``.
        bits (int, optional): Bits an element of queries and keys at every
            level but L0. Valid values are 1 to 8. Defaults to the level's for
            attention. Values have the level's.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to the model's, which is 256
            unless the conversion says otherwise.
        **kwargs: As ``nn.MultiheadAttention``.

    Examples:
        >>> x = torch.randn(5, 2, 16, requires_grad=True)
        >>> output, _ = QMultiheadAttention(16, 4)(x, x, x)
        >>> output.sum().backward()
    """

    kind = 'attention'
    shares_bits = False

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        """See ``nn.MultiheadAttention``."""
        if need_weights and self._weights_are_dropped():
            # None: torch would compute them.
            need_weights = None
        return run(
            self,
            nn.MultiheadAttention.forward,
            QMultiheadAttention._compress,
            (
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            ),
            (key, value, key_padding_mask, attn_mask, *self._parts()),
        )

    def _parts(self):
        """Its parameters, as ``parameters()`` without a search for twins."""
        yield from self._parameters.values()
        for part in self._modules.values():
            if part._modules:
                yield from part.parameters()
            else:
                yield from part._parameters.values()

    def _compress(
        self,
        query,
        key,
        value,
        padding,
        need_weights,
        mask,
        average,
        is_causal,
    ):
        if not self._can_code(query, key, value, padding, mask, is_causal):
            # It raises the errors of invalid arguments, too.
            return nn.MultiheadAttention.forward(
                self,
                query,
                key,
                value,
                padding,
                need_weights,
                mask,
                average,
                is_causal,
            )
        is_batched = query.dim() == 3
        batch_first = self.batch_first and is_batched
        if is_causal and padding is None and not need_weights:
            mask = None
        else:
            is_causal = False
        # [L, N, C], whatever the order of the input.
        q, k, v = self._project(query, key, value)
        if not is_batched:
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        elif batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        terms = self._make_terms(q.shape[1], padding, mask)
        k, v = self._extend(k, self.bias_k), self._extend(v, self.bias_v)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for x in (q, k, v)
        )
        core = FusedCore(
            self.dropout, is_causal, is_explicit=need_weights is None
        )
        if need_weights:
            core = ExplicitCore(self.dropout, average)
        found = attention(q, k, v, self.quantizer, terms, core, hides=True)
        output, weights = found if need_weights else (found, None)
        del q, k, v, found
        order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
        output = self._project_out(output.permute(order).flatten(2))
        if not is_batched:
            output = output.squeeze(1)
            weights = weights if weights is None else weights.squeeze(0)
        return output, weights

    def _weights_are_dropped(self):
        """Whether the calling module drops the weights."""
        mode = active_mode()
        return (
            mode is not None
            and mode.scope is not None
            and mode.scope.reads_first_only(self)
            and not self._forward_hooks
            and not is_observed()
        )

    def _can_code(self, query, key, value, padding, mask, is_causal):
        """Whether arguments are valid, and of dtypes that codes stand for."""
        dims = query.dim()
        if dims not in (2, 3) or not (key.dim() == value.dim() == dims):
            return False
        sizes = self.embed_dim, self.kdim, self.vdim
        inputs = query, key, value
        if any(x.shape[-1] != size for x, size in zip(inputs, sizes)):
            return False
        if dims == 2:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        (samples, length, _), keys = inputs[0].shape, inputs[1].shape[1]
        paddings = [(samples, keys)] if dims == 3 else [(keys,)]
        masks = (length, keys), (samples * self.num_heads, length, keys)
        return (
            can_code_attention(*inputs, self.dropout)
            and inputs[1].shape[:2] == inputs[2].shape[:2]
            and _is_mask(padding, paddings)
            and _is_mask(mask, masks)
            and not (is_causal and mask is None)
        )

    def _project(self, query, key, value):
        """Projections of the inputs, as few products as inputs differ."""
        inputs = query, key, value
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3
            if self.in_proj_bias is not None:
                biases = self.in_proj_bias.chunk(3)
            weights = (
                self.q_proj_weight,
                self.k_proj_weight,
                self.v_proj_weight,
            )
            return [
                self._linear(*arguments)
                for arguments in zip(inputs, weights, biases)
            ]
        sources = [_before_transpose(x) for x in inputs]
        groups, start = [], 0
        while start < 3:
            source, transposed = sources[start]
            stop = start + 1
            while stop < 3 and sources[stop][0] is source:
                if sources[stop][1] != transposed:
                    break
                stop += 1
            groups.append((source, transposed, stop - start))
            start = stop
        # Parts of one split: slices would have a gradient each of full size.
        counts = [count for _, _, count in groups]
        weights = self._split(self.in_proj_weight, counts)
        biases = self._split(self.in_proj_bias, counts)
        outputs = []
        for (source, transposed, count), *parts in zip(
            groups, weights, biases
        ):
            output = self._linear(source, *parts)
            if transposed:
                output = output.transpose(0, 1)
            outputs += output.chunk(count, -1)
        return outputs

    def _split(self, parameter, counts):
        """Rows of a parameter for inputs that stand for several of three."""
        if parameter is None or len(counts) == 1:
            return [parameter] * len(counts)
        return parameter.split([count * self.embed_dim for count in counts])

    def _linear(self, input, weight, bias):
        bits = self.quantizer.linear_bits
        if bits is None:
            return F.linear(input, weight, bias)
        return linear(input, weight, bias, self.quantizer.at_bits(bits))

    def _project_out(self, input):
        """Output projection, by the settings of ``out_proj`` if it has any."""
        layer = self.out_proj
        if not isinstance(layer, QLinear):
            return self._linear(input, layer.weight, layer.bias)
        weight, bias = layer.weight, layer.bias
        if keeps_codes(layer, input, (weight, bias)):
            return linear(input, weight, bias, layer.quantizer)
        return F.linear(input, weight, bias)

    def _make_terms(self, samples, padding, mask):
        """Masks as tensors that broadcast to the scores."""
        extra = (self.bias_k is not None) + self.add_zero_attn
        terms = []
        if mask is not None:
            if mask.dim() == 3:
                terms.append(mask.unflatten(0, (samples, self.num_heads)))
            else:
                terms.append(mask[None, None])
        if padding is not None:
            terms.append(padding.view(samples, 1, 1, -1))
        return [F.pad(term, (0, extra)) if extra else term for term in terms]

    def _extend(self, tokens, bias):
        """Append the learnt key or value, and one of zeros."""
        parts = [tokens]
        if bias is not None:
            parts.append(bias.to(tokens.dtype).expand(-1, tokens.shape[1], -1))
        if self.add_zero_attn:
            parts.append(tokens.new_zeros(1, *tokens.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else tokens


def _is_mask(mask, shapes):
    return mask is None or (
        mask.shape in shapes
        and (mask.dtype is torch.bool or mask.is_floating_point())
    )


def _before_transpose(input):
    """The tensor that an input is the transpose of, if it is one.

    A layer before this one, such as a normalisation, knows that tensor, and
    may have a payload of it. Wrappers transpose inputs, and each of query,
    key and value by itself.

    Returns:
        tuple[Tensor, bool]: The tensor, and whether the input is its
        transpose; else the input itself.
    """
    base, node = input._base, input.grad_fn
    if (
        base is None
        or base.dim() != 3
        or type(node).__name__
        not in ('TransposeBackward0', 'PermuteBackward0')
        or input._backward_hooks
        or input.retains_grad
    ):
        return input, False
    twin = base.transpose(0, 1)
    if (
        twin.shape != input.shape
        or twin.stride() != input.stride()
        or twin.storage_offset() != input.storage_offset()
        or twin.grad_fn.next_functions != node.next_functions
    ):
        return input, False
    return base, True
