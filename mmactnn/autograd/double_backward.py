"""Second derivatives: exact where nothing was rounded, else refused.

Gradients of a batch of vectors at once (``is_grads_batched=True``,
``jacobian(vectorize=True)``) are computed one by one: kernels of this package
have no rules for ``vmap``.
"""

import functools
import itertools

import torch
from torch.autograd import Function

from ..modules.eager import never_compiled

_functorch = torch._C._functorch
_BATCHED = torch._C._parse_dispatch_key('Batched')


class _Refuse(Function):
    """Identity of gradients whose backward pass raises an error.

    All tensors that the gradients depend on are its inputs, so that every
    derivative of the gradients leads through this node.
    """

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(grad.detach() for grad in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f'{ctx.name} cannot be differentiated twice: its input is kept '
            'as codes only. Leave the layer exact (exclude it from the '
            'conversion, or use level L0) where create_graph=True is needed'
        )


class _LinearMap(Function):
    """A linear function of one tensor, with derivatives of any order."""

    @staticmethod
    def forward(ctx, function, adjoint, tensor):
        ctx.function, ctx.adjoint = function, adjoint
        return function(tensor)

    @staticmethod
    def backward(ctx, grad_output):
        grad = linear_map(ctx.adjoint, ctx.function, grad_output)
        return None, None, grad


def linear_map(function, adjoint, tensor):
    """Apply a linear function; the derivative is its adjoint.

    Gradients of layers that round nothing are such functions.

    Args:
        function (Callable): Maps a tensor to a tensor.
        adjoint (Callable): The adjoint map; ``function`` itself if that is
            self-adjoint, such as a mask.
        tensor (Tensor[*]): Its argument.

    Returns:
        Tensor[*]: The value.
    """
    if _is_batched(tensor):
        return _for_each(
            lambda part: (linear_map(function, adjoint, part),), (tensor,)
        )[0]
    if not torch.is_grad_enabled():
        return function(tensor)
    return _LinearMap.apply(function, adjoint, tensor)


def first_order_only(name, unless=None):
    """Decorate ``Function.backward``: gradients of gradients raise.

    First-order gradients with ``create_graph=True`` are correct; only
    differentiating them is refused: with respect to any leaf before the
    layer, to anything that the gradient of its output depends on, and to its
    input. Other tensors before the layer that are not leaves are unknown
    here: for these, and a loss that is linear in the output, autograd raises
    that the tensor is not used. The :class:`LayerBits` in ``ctx.adaptive``, if
    there are any, are notified of the backward pass.

    Args:
        name (str | Callable): Name of the layer in the error, or a function
            of ``ctx`` that tells it.
        unless (Callable, optional): Maps ``ctx`` to whether nothing was
            rounded, so that the backward pass consists of differentiable
            functions. Defaults to never.
    """

    def decorate(backward):
        def one(ctx, *grad_outputs):
            layer_bits = getattr(ctx, 'adaptive', None)
            if layer_bits is not None:
                layer_bits.note_backward()
            if not torch.is_grad_enabled() or (unless and unless(ctx)):
                return backward(ctx, *grad_outputs)
            # create_graph=True: put the refusal into the graph.
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            present = [grad for grad in grads if grad is not None]
            if not present:
                return grads
            reasons = [*_leaves_before(ctx), *_sources(ctx)]
            reasons += [grad for grad in grad_outputs if grad is not None]
            label = name(ctx) if callable(name) else name
            refusing = iter(
                _Refuse.apply(label, len(present), *present, *reasons)
            )
            return tuple(
                None if grad is None else next(refusing) for grad in grads
            )

        @never_compiled
        @functools.wraps(backward)
        def wrapper(ctx, *grad_outputs):
            if any(map(_is_batched, grad_outputs)):
                return _for_each(functools.partial(one, ctx), grad_outputs)
            return one(ctx, *grad_outputs)

        return wrapper

    return decorate


def _leaves_before(node):
    """Leaves of the graph that the inputs of a node depend on."""
    leaves, seen, todo = [], set(), [node]
    while todo:
        for before, _ in todo.pop().next_functions:
            if before is None or before in seen:
                continue
            seen.add(before)
            leaf = getattr(before, 'variable', None)
            if leaf is None:
                todo.append(before)
            else:
                leaves.append(leaf)
    return leaves


def _sources(ctx):
    """The input of a layer, if it is still alive."""
    source = getattr(ctx, 'source', None)
    source = source and source()
    return [] if source is None else [source]


def _is_batched(tensor):
    """Whether a tensor is batched by ``vmap``, or by autograd's own one."""
    return tensor is not None and (
        torch._C._dispatch_keys(tensor).has(_BATCHED)
        or _functorch.is_batchedtensor(tensor)
    )


def _take_apart(tensor):
    """Members of a batch, and the function that stacks them again."""
    if torch._C._dispatch_keys(tensor).has(_BATCHED):
        members = torch._remove_batch_dim(tensor, 1, 1, 0).unbind()
        return members, lambda whole: torch._add_batch_dim(whole, 0, 1)
    level = _functorch.maybe_get_level(tensor)
    whole = _functorch.get_unwrapped(tensor)
    members = whole.unbind(_functorch.maybe_get_bdim(tensor))
    return members, lambda whole: _functorch._add_batch_dim(whole, 0, level)


def _for_each(function, tensors):
    """Call a function for each member of a batch of ``vmap``.

    Args:
        function (Callable): Maps tensors to a tuple of tensors and None.
        tensors (Sequence[Tensor | None]): Its arguments; those that are
            batched by one level of ``vmap`` are taken apart.

    Returns:
        tuple[Tensor | None]: The values, batched by the same level.

    Raises:
        RuntimeError: If they are batched by several.
    """
    columns, count = [], 0
    for tensor in tensors:
        column = itertools.repeat(tensor)
        if _is_batched(tensor):
            column, as_batch = _take_apart(tensor)
            count = len(column)
            if any(map(_is_batched, column)):
                raise RuntimeError(
                    'gradients of compressed layers can be batched once '
                    '(is_grads_batched=True), got a batch of batches; use '
                    'level L0'
                )
        columns.append(column)
    results = [function(*row) for row, _ in zip(zip(*columns), range(count))]
    return tuple(
        None if values[0] is None else as_batch(torch.stack(values))
        for values in zip(*results)
    )
