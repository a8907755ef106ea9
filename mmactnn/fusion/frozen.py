"""Layers that are not trained, in a model that is."""

import torch

from ..ops.layout import with_strides
from .members import may_be_passed_over, may_join
from .watched import is_only_reader


def finish_frozen(output, conv, norm, relu, added=None):
    """What follows a convolution that is not trained.

    One pass over memory, and none of its own memory, if nobody can tell.

    Args:
        output (Tensor[N, C, *]): What the convolution returned; overwritten.
        conv (nn.Module): The convolution.
        norm (nn.Module): The normalisation.
        relu (nn.Module, optional): The ReLU, if one follows.
        added (Tensor[N, C, *], optional): What is added before it.

    Returns:
        Tensor[N, C, *]: The output of the last of them.
    """
    if (
        may_join(norm)
        and (relu is None or may_be_passed_over(relu))
        and is_only_reader(conv)
        and norm.is_frozen(output)
        and (
            added is None
            or (added.shape == output.shape and added.dtype == output.dtype)
        )
    ):
        if added is not None:
            added = with_strides(added, output.stride())
        norm.frozen_act_(output, relu is not None, added)
        return output
    output = norm(output)
    if added is not None:
        output = output + added
    return output if relu is None else relu(output)


def is_frozen(module, input):
    """Whether a module takes part in training, but is not trained.

    Args:
        module (nn.Module): The module.
        input (Tensor[*]): Its input.
    """
    return (
        not module.training
        and torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not input.requires_grad
    )
