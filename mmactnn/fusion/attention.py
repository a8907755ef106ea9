"""Explicit softmax attention in the traces of blocks.

It makes a matrix of scores, a softmax of it, and a product
with the values, and autograd keeps the matrix once or twice. Where the calls
are the function that ``F.scaled_dot_product_attention`` computes, a site
computes them by that, from codes of queries, keys and values. Values differ
by rounding in the last bits, and where a mask hides all keys of a query: the
function gives zeros in place of NaN for ``-inf``, and in half precision
another mean of the values for numbers below its range.
"""

import functools
import math
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..autograd import FusedCore, attention, can_code_attention
from ..autograd.score_terms import raise_term
from ..codes.moved import move_exactly
from ..functional import settings_of
from ..layers import CodedLayer, QDropout
from ..modules.execution import is_ordinary
from ..registry import default_registry, register_pattern
from .eligibility import is_instrumented
from .sites import Site
from .values import WrittenCalls, fill, with_refs

_PRODUCTS = (operator.matmul, torch.matmul, torch.bmm)
_SUMS = (operator.add, operator.iadd, torch.add)
_SCALINGS = (operator.mul, operator.imul, torch.mul)
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div)
_SOFTMAXES = (F.softmax, torch.softmax)
_DROPOUTS = (F.dropout, torch.dropout)
# Methods that change dtype or layout, but no value of the softmax.
_CASTS = ('float', 'half', 'bfloat16', 'to', 'type', 'type_as', 'contiguous')
_VIEWS = ('view', 'reshape')


class _Change(NamedTuple):
    """A step from the product of queries and keys to the softmax.

    Attributes:
        kind (str): ``'scale'``, ``'divide'``, ``'add'``, ``'hide'`` or
            ``'view'``.
        value (object): Factor, divisor, summand, mask, or sizes: constants
            and references.
    """

    kind: str
    value: object


class _Unlike(Exception):
    """Signal that values do not fit torch's function at this call."""


class SoftmaxAttention(Site):
    """``softmax(query @ key.T + ...) @ value``, in any of its forms.

    Args:
        nodes (Sequence[fx.Node]): See :class:`Site`.
        softmax (str, optional): Name of the softmax; None for a function.
        dropout (str, optional): Name of the dropout; None for a function or
            none at all.
        form (_Form): Roles of the values.
    """

    draws = True

    def __init__(self, nodes, softmax, dropout, form):
        covered = set(nodes)
        inputs = dict.fromkeys(
            source
            for node in nodes
            for source in node.all_input_nodes
            if source not in covered
        )
        # The block has the settings of the functions that it calls.
        members = ('', softmax, dropout)
        super().__init__(nodes, inputs, members)
        slots = {node: i for i, node in enumerate(self.inputs)}
        self._form = _Form(*with_refs(tuple(form), slots))
        self._written = WrittenCalls(self.nodes, self.inputs, members)

    def run(self, layers, *inputs):
        """See the base class."""
        block, softmax, dropout = layers
        if all(
            layer is None or not is_instrumented(layer)
            for layer in (softmax, dropout)
        ):
            form = _Form(*fill(tuple(self._form), inputs))
            try:
                return form.attend(_quantizer_of(block), softmax, dropout)
            except _Unlike:
                pass
        return self._written(layers, inputs)


class _Form(NamedTuple):
    """Roles of the values of explicit attention.

    Attributes:
        query (Tensor[*, L, D]): Queries.
        key (Tensor[*, S, D]): Keys, in the form of ``key_order``.
        value (Tensor[*, S, E]): Values, in the form of ``value_order``.
        orders (tuple): Permutations of query, key and value to the form that
            torch takes, and of its output; ``'T'`` is a transposed matrix,
            None the identity.
        changes (tuple[_Change]): Steps from scores to the softmax.
        dim (int): Dimension of the softmax.
        dropout (tuple): Probability and mode of a dropout that is a function;
            empty without.
    """

    query: object
    key: object
    value: object
    orders: tuple
    changes: tuple
    dim: object
    dropout: tuple

    def attend(self, quantizer, softmax, dropout):
        """Compute the output by torch's function, from codes.

        Args:
            quantizer (LayerQuantizer, optional): Settings of the block's
                attention; None for exact.
            softmax (nn.Module, optional): The softmax, if it is a layer.
            dropout (nn.Module, optional): The dropout, if it is a layer.

        Returns:
            Tensor[*, L, E]: The output.

        Raises:
            _Unlike: If the calls are another function of these values.
        """
        if quantizer is None or quantizer.exact:
            raise _Unlike
        tensors = [
            _permuted(x, order) for x, order in zip(self[:3], self.orders[:3])
        ]
        query, key, value = tensors
        lead = query.shape[:-2]
        if (
            len(lead) not in (1, 2)
            or key.shape[:-2] != lead
            or value.shape[:-2] != lead
            or key.shape[-1] != query.shape[-1]
            or value.shape[-2] != key.shape[-2]
            or not query.dtype == key.dtype == value.dtype
        ):
            raise _Unlike
        dims = len(lead) + 2
        dim = self.dim if softmax is None else softmax.dim
        if dim not in (-1, dims - 1):
            raise _Unlike
        probability = _probability(self.dropout, dropout)
        if not can_code_attention(*tensors, probability):
            raise _Unlike
        shape = *lead, query.shape[-2], key.shape[-2]
        # A bias that a table has is not kept.
        move = functools.partial(move_exactly, quantizer.cache)
        scale, factors, terms, period = self._collect(shape, query.dtype, move)
        used = query, key, value, *terms, *factors
        if not all(map(is_ordinary, used)) or not any(
            x.requires_grad for x in used
        ):
            raise _Unlike
        if len(lead) == 1:
            # Fused kernels want heads.
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            terms = [move(torch.unsqueeze, t, 1) for t in terms]
        for factor in factors:
            query = query * factor
        core = FusedCore(probability, scale=scale, is_explicit=True)
        output = attention(
            query, key, value, quantizer, terms, core, True, period
        )
        if len(lead) == 1:
            output = output.squeeze(1)
        return _permuted(output, self.orders[3])

    def _collect(self, shape, dtype, move):
        """Scale, further factors, summands of the scores and their period."""
        scale, factors, terms, period = 1.0, [], [], 1
        now = shape
        for kind, value in self.changes:
            if kind in ('scale', 'divide'):
                if isinstance(value, torch.Tensor):
                    if (
                        kind == 'divide'
                        or value.shape[-2:] != (1, 1)[: value.dim()]
                    ):
                        raise _Unlike
                    factors.append(value)
                elif isinstance(value, (int, float)):
                    scale *= 1.0 / value if kind == 'divide' else value
                else:
                    raise _Unlike
            elif kind == 'view':
                now = torch.empty(now, device='meta').reshape(*value).shape
            else:
                if not isinstance(value, torch.Tensor) or (
                    value.is_floating_point() == (kind == 'hide')
                ):
                    raise _Unlike
                term, repeats = _as_term(value, now, shape, move)
                if repeats > 1:
                    if period not in (1, repeats):
                        raise _Unlike
                    period = repeats
                terms.append(_in_dtype(term, dtype, move))
        if now != shape:
            raise _Unlike
        return scale, factors, terms, period


def _as_term(value, now, shape, move):
    """A summand of reshaped scores as one of the scores, and its period.

    Args:
        value (Tensor[*]): The summand.
        now (Sequence[int]): Shape of the scores where it is added.
        shape (Sequence[int]): Shape of the scores as their product has it.
        move (Callable): Calls a function of a tensor, see
            :func:`.moved.move_exactly`.

    Returns:
        tuple[Tensor[*], int]: A tensor that broadcasts to the scores once it
        is repeated over their first dimension; the number of samples after
        which it repeats, 1 if it need not be.
    """
    missing = len(now) - value.dim()
    if missing < 0:
        raise _Unlike
    if missing:
        value = move(operator.getitem, value, (None,) * missing)
    if tuple(now) == tuple(shape):
        return value, 1
    if len(now) != len(shape) + 1 or tuple(now[2:]) != tuple(shape[1:]):
        raise _Unlike
    groups, inner = value.shape[:2]
    if groups > 1:
        sizes = now[0], now[1], *value.shape[2:]
        value = move(torch.Tensor.expand, value, sizes)
        return move(torch.flatten, value, 0, 1), 1
    value = move(operator.getitem, value, 0)
    return value, 1 if now[0] == 1 else inner


def _in_dtype(term, dtype, move):
    """A summand in the dtype of the scores; a mask as it is."""
    if term.dtype is torch.bool or term.dtype is dtype:
        return term
    lowest = torch.finfo(dtype).min
    if torch.finfo(term.dtype).min < lowest:
        # Large negative numbers are masks; not -inf, which a row may be full
        # of.
        term = move(raise_term, term, lowest)
    return move(torch.Tensor.to, term, dtype)


def _probability(function, layer):
    """Probability of dropout."""
    if layer is not None:
        if not isinstance(layer, nn.Dropout):
            raise _Unlike
        return float(layer.p) if layer.training else 0.0
    if not function:
        return 0.0
    probability, training = function
    return float(probability) if training else 0.0


def _permuted(tensor, order):
    if order is None:
        return tensor
    return tensor.mT if order == 'T' else tensor.permute(order)


@register_pattern('softmax_attention', layers=(CodedLayer, QDropout))
def match_softmax_attention(block):
    """Match explicit softmax attention.

    Args:
        block (Block): The block.

    Yields:
        SoftmaxAttention: The sites.
    """
    matcher = _Matcher(block)
    for node in block.trace.calls:
        found = _is_softmax(block, node)
        if found:
            site = matcher.match(node, *found)
            if site is not None:
                yield site


def _quantizer_of(block):
    """Settings of the attention of a block, if it is compressed."""
    settings = settings_of(block)
    if settings is None:
        return None
    entry = default_registry.functions[F.scaled_dot_product_attention]
    return settings.quantizer_for(entry)


def _is_softmax(block, node):
    """Input and dimension of a softmax, else an empty tuple."""
    if node.op == 'call_module':
        layer = block.layer(node)
        if type(layer) is nn.Softmax:
            return node.args[0], None
        return ()
    if not _calls(node, _SOFTMAXES, ('softmax',)) or not node.args:
        return ()
    kwargs = dict(node.kwargs)
    dim = kwargs.pop('dim', node.args[1] if len(node.args) > 1 else None)
    dtype = kwargs.pop('dtype', None)
    kwargs.pop('_stacklevel', None)
    if kwargs or len(node.args) > 2 or dtype not in (None, torch.float32):
        return ()
    return node.args[0], dim


def _calls(node, functions, methods=()):
    return (node.op == 'call_function' and node.target in functions) or (
        node.op == 'call_method' and node.target in methods
    )


class _Matcher:
    """Search for the calls around a softmax."""

    def __init__(self, block):
        self._block = block

    def match(self, softmax, source, dim):
        """Site around a softmax, or None."""
        before = self._scores(source, softmax)
        after = self._output(softmax)
        if before is None or after is None:
            return None
        nodes, changes, query, key, orders = before
        tail, value, dropout, module, value_orders = after
        if orders is None or value_orders is None:
            return None
        form = _Form(
            query,
            key,
            value,
            (*orders, *value_orders),
            tuple(changes),
            dim,
            dropout,
        )
        name = softmax.target if softmax.op == 'call_module' else None
        order = {node: i for i, node in enumerate(self._block.trace.calls)}
        nodes = sorted([*nodes, softmax, *tail], key=order.get)
        return SoftmaxAttention(nodes, name, module, form)

    def _is_inner(self, node, user):
        """Whether a call has no other user than the given one."""
        return (
            isinstance(node, fx.Node)
            and self._block.only_user(node) is user
            and node in self._block.calls
        )

    def _scores(self, node, user):
        """Calls from the product of queries and keys up to ``node``.

        Returns:
            tuple, optional: Calls, changes, query, key and their
            permutations.
        """
        if not self._is_inner(node, user):
            return None
        start = self._product(node)
        if start is not None:
            return start
        for inner, changes in _changes(node):
            found = self._scores(inner, node)
            if found is not None:
                nodes, before, *rest = found
                added = any(c.kind in ('add', 'hide') for c in before)
                scales = any(c.kind in ('scale', 'divide') for c in changes)
                if added and scales:
                    return None
                return [*nodes, node], [*before, *changes], *rest
        return None

    def _product(self, node):
        """The product of queries and keys; see :meth:`_scores`."""
        changes, nodes = [], [node]
        orders = None, 'T'
        if _calls(node, _PRODUCTS, ('matmul', 'bmm')):
            if len(node.args) != 2 or node.kwargs:
                return None
            query, key = node.args
        elif _calls(node, (torch.baddbmm,), ('baddbmm',)):
            options = dict(node.kwargs)
            beta, alpha = options.pop('beta', 1), options.pop('alpha', 1)
            if len(node.args) != 3 or options or beta not in (0, 1):
                return None
            term, query, key = node.args
            changes.append(_Change('scale', alpha))
            if beta:
                changes.append(_Change('add', term))
        elif _calls(node, (torch.einsum,)):
            found = _einsum(node)
            orders = None if found is None else _score_orders(*found[0])
            if orders is None:
                return None
            query, key = found[1]
        else:
            return None
        if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
            return None
        scaled = _scaling(query)
        if scaled is not None and self._is_inner(query, node):
            source, change = scaled
            nodes.insert(0, query)
            changes.insert(0, change)
            query = source
        return nodes, changes, query, key, orders

    def _output(self, softmax):
        """Calls behind a softmax up to the product with the values.

        Returns:
            tuple, optional: Calls, value, arguments of a dropout that is a
            function, name of one that is a layer, permutations of value and
            output.
        """
        nodes, function, module = [], (), None
        last = softmax
        while True:
            node = self._block.only_user(last)
            if node is None or not node.args:
                return None
            nodes.append(node)
            if node.args[0] is last and self._is_dropout(node):
                if function or module:
                    return None
                if node.op == 'call_module':
                    module = node.target
                else:
                    function = _dropout_arguments(node)
                    if function is None:
                        return None
            elif node.args[0] is not last or not _calls(node, (), _CASTS):
                break
            last = node
        if _calls(node, _PRODUCTS, ('matmul', 'bmm')):
            if len(node.args) != 2 or node.kwargs or node.args[0] is not last:
                return None
            return nodes, node.args[1], function, module, (None, None)
        found = _einsum(node) if _calls(node, (torch.einsum,)) else None
        if found is None or found[1][0] is not last:
            return None
        return nodes, found[1][1], function, module, _value_orders(*found[0])

    def _is_dropout(self, node):
        if node.op == 'call_module':
            layer = self._block.layer(node)
            return isinstance(layer, nn.Dropout)
        return _calls(node, _DROPOUTS)


def _changes(node):
    """Ways to read a call as a change of scores: their node, and changes."""
    scaled = _scaling(node)
    if scaled is not None:
        source, change = scaled
        yield source, [change]
        if change.kind == 'scale' and isinstance(change.value, fx.Node):
            yield change.value, [_Change('scale', source)]
    elif _calls(node, _SUMS, ('add', 'add_')):
        if len(node.args) == 2 and not node.kwargs:
            left, right = node.args
            yield left, [_Change('add', right)]
            if _calls(node, (operator.add, torch.add), ('add',)):
                yield right, [_Change('add', left)]
    elif _calls(node, (), _VIEWS):
        source, *sizes = node.args
        if not node.kwargs:
            yield source, [_Change('view', tuple(sizes))]
    elif _calls(node, (), ('masked_fill', 'masked_fill_')):
        if len(node.args) == 3 and node.args[2] == -math.inf:
            yield node.args[0], [_Change('hide', node.args[1])]
    elif _calls(node, (), _CASTS):
        yield node.args[0], []


def _scaling(node):
    """Operand and change of a product or quotient, or None."""
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if _calls(node, _QUOTIENTS, ('div', 'div_')):
        return left, _Change('divide', right)
    if not _calls(node, _SCALINGS, ('mul', 'mul_')):
        return None
    if isinstance(left, fx.Node):
        return left, _Change('scale', right)
    return right, _Change('scale', left)


def _dropout_arguments(node):
    """Probability and mode of a call of dropout, or None."""
    values = dict(zip(('input', 'p', 'training', 'inplace'), node.args))
    values.update(node.kwargs)
    if 'train' in values:
        values['training'] = values.pop('train')
    if not values.keys() <= {'input', 'p', 'training', 'inplace'}:
        return None
    return values.get('p', 0.5), values.get('training', True)


def _einsum(node):
    """Letters of two operands and the result of an einsum, and operands."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or node.kwargs:
        return None
    sides = equation.replace(' ', '').split('->')
    factors = sides[0].split(',')
    if len(sides) != 2 or len(factors) != 2:
        return None
    letters = *factors, sides[1]
    if any(not s.isalpha() or len(set(s)) != len(s) for s in letters):
        return None
    return letters, operands


def _score_orders(query, key, scores):
    """Permutations of queries and keys, or None for another product."""
    lead = scores[:-2]
    channel = set(query) & set(key) - set(scores)
    if len(channel) != 1 or len(scores) < 3:
        return None
    length, keys = scores[-2:]
    (c,) = channel
    wanted = f'{lead}{length}{c}', f'{lead}{keys}{c}'
    return _permutations((query, key), wanted)


def _value_orders(weights, value, output):
    """Permutations of values and of the output, or None."""
    lead, (length, keys) = weights[:-2], weights[-2:]
    channel = set(value) - set(weights)
    if len(channel) != 1 or keys in output:
        return None
    (c,) = channel
    value_order = _permutations((value,), (f'{lead}{keys}{c}',))
    output_order = _permutations((f'{lead}{length}{c}',), (output,))
    if value_order is None or output_order is None:
        return None
    return *value_order, *output_order


def _permutations(letters, wanted):
    if any(sorted(a) != sorted(b) for a, b in zip(letters, wanted)):
        return None
    return tuple(
        tuple(map(have.index, want)) for have, want in zip(letters, wanted)
    )
