"""Derivatives of gradients: exact where nothing was rounded, else refused.

Gradients of a batch of vectors at once (``is_grads_batched=True``,
``jacobian(vectorize=True)``) are computed one by one: kernels of this package
have no rules for ``vmap``.
"""

import functools

import torch
from torch.autograd import Function

_functorch = torch._C._functorch


class _Refuse(Function):
    """Identity of some gradients whose own backward tells why there is none.

    It hangs on all that the gradients depend on, so that whoever asks for a
    derivative of them comes through here.
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

    What gradients of exact layers are made by.

    Args:
        function (Callable): Maps a tensor to a tensor.
        adjoint (Callable): The adjoint map; ``function`` itself if that is
            self-adjoint, such as a mask.
        tensor (Tensor[*]): Its argument.

    Returns:
        Tensor[*]: The value.
    """
    if _functorch.peek_interpreter_stack() is not None:
        return _for_each(
            lambda part: (linear_map(function, adjoint, part),), (tensor,)
        )[0]
    if not torch.is_grad_enabled():
        return function(tensor)
    return _LinearMap.apply(function, adjoint, tensor)


def first_order_only(name, unless=None):
    """Decorate ``Function.backward``: gradients of gradients raise.

    The first-order gradients of ``create_graph=True`` are right; only
    differentiating them is refused, however it is asked for: with respect to
    any leaf before the layer, to anything that the gradient of its output
    depends on, and to its input. Of other tensors before it that are no
    leaves nothing is known here; asked for one of them with a loss that is
    linear in the output, autograd says that it is not used.

    Args:
        name (str): What the error calls the layer.
        unless (Callable, optional): Tells of a ``ctx`` whether nothing was
            rounded and its backward is made of differentiable functions.
            Defaults to never.
    """

    def decorate(backward):
        def one(ctx, *grad_outputs):
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
            refusing = iter(
                _Refuse.apply(name, len(present), *present, *reasons)
            )
            return tuple(
                None if grad is None else next(refusing) for grad in grads
            )

        @functools.wraps(backward)
        def wrapper(ctx, *grad_outputs):
            if _functorch.peek_interpreter_stack() is None:
                return one(ctx, *grad_outputs)
            return _for_each(functools.partial(one, ctx), grad_outputs)

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
    """The input of a layer, if anybody still has it."""
    source = getattr(ctx, 'source', None)
    source = source and source()
    return [] if source is None else [source]


def _for_each(function, tensors):
    """Call a function for each member of a batch of ``vmap``.

    Args:
        function (Callable): Maps tensors to a tuple of tensors and None.
        tensors (Sequence[Tensor | None]): Its arguments; those that are
            batched by one level of ``vmap`` are taken apart.

    Returns:
        tuple[Tensor | None]: The values, batched by the same level.

    Raises:
        RuntimeError: Under any other transform.
    """
    batched = [
        tensor is not None and _functorch.is_batchedtensor(tensor)
        for tensor in tensors
    ]
    if not any(batched):
        return function(*tensors)
    levels = {
        _functorch.maybe_get_level(tensor)
        for tensor, is_batched in zip(tensors, batched)
        if is_batched
    }
    parts = [
        _functorch.get_unwrapped(tensor).unbind(
            _functorch.maybe_get_bdim(tensor)
        )
        if is_batched
        else None
        for tensor, is_batched in zip(tensors, batched)
    ]
    nested = any(
        _functorch.is_functorch_wrapped_tensor(part[0])
        for part in parts
        if part
    )
    if len(levels) > 1 or nested:
        raise RuntimeError(
            'gradients of compressed layers take one level of vmap at most '
            f'(is_grads_batched=True), got levels {sorted(levels)} and more; '
            'use level L0'
        )
    (level,) = levels
    count = next(len(part) for part in parts if part is not None)
    results = [
        function(
            *(
                tensor if part is None else part[i]
                for tensor, part in zip(tensors, parts)
            )
        )
        for i in range(count)
    ]
    return tuple(
        None
        if values[0] is None
        else _functorch._add_batch_dim(torch.stack(values), 0, level)
        for values in zip(*results)
    )
