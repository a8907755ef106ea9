"""Common parts of backward passes: notes to adaptive precision, errors."""

import functools

import torch
from torch.autograd import Function


class _Refuse(Function):
    """Identity whose own backward tells why there is none."""

    @staticmethod
    def forward(ctx, name, *grads):
        ctx.name = name
        return tuple(grad.detach() for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f'{ctx.name} cannot be differentiated twice: its input is kept '
            'as codes only. Leave the layer exact (exclude it from the '
            'conversion, or use level L0) where create_graph=True is needed'
        )


def first_order_only(name):
    """Decorate ``Function.backward``: gradients of gradients raise.

    The first-order gradients of ``create_graph=True`` are right; only
    differentiating them is refused. A slot on ``ctx.adaptive`` is told of the
    backward pass.

    Args:
        name (str): What the error calls the layer.
    """

    def decorate(backward):

        @functools.wraps(backward)
        def wrapper(ctx, *grad_outputs):
            slot = getattr(ctx, 'adaptive', None)
            if slot is not None:
                slot.note_backward()
            if not torch.is_grad_enabled():
                return backward(ctx, *grad_outputs)
            # create_graph=True: put the refusal into the graph.
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            present = [grad for grad in grads if grad is not None]
            tracked = [grad.requires_grad_() for grad in present]
            refusing = iter(_Refuse.apply(name, *tracked)) if tracked else None
            return tuple(
                None if grad is None else next(refusing) for grad in grads
            )

        return wrapper

    return decorate
