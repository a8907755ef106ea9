"""Contexts of autograd functions that run inside of others."""


class StandInContext:
    """Stand-in for the context of an autograd function.

    Args:
        needs_input_grad (tuple[bool]): Which arguments need a gradient.
    """

    def __init__(self, needs_input_grad):
        self.needs_input_grad = needs_input_grad
        self.saved_tensors = ()

    def save_for_backward(self, *tensors):
        """Hold the tensors."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        """Ignored: there is one output."""

    def set_materialize_grads(self, value):
        """Ignored: the gradient of the one output is there."""
