"""Variance that rounding a layer's input adds to gradients of the model.

All in closed form and on the device. A group of range R that is rounded to b
bits adds to each of its elements the variance
``E[f * (1 - f)] * (R / (2 ** b - 1)) ** 2``, with 1/6 for the mean over
fractions f of a step that are uniform on [0, 1]; with dither it is 1/12
whatever f is (:class:`mmactnn.ops.DrawnBits`). A group that is rotated has
``D / (1 - D)`` of the variance of its values, see
:func:`.variance.variance_of_normal_values`. ``At one bit`` means over
:func:`.variance.relative_variance` at the mean b of the tensor's samples: the
result includes the effect of how bits are allocated to samples.
"""

import torch

from ..ops.channels import dims_but_channels
from ..ops.rotation import SQUARED_ERRORS, STEPS, rotates
from .variance import relative_variance


def squared_norms(grad_output):
    """Squared norm of each sample's gradient.

    Args:
        grad_output (Tensor[N, *]): Any float dtype.

    Returns:
        Tensor[N]: float32.
    """
    dims = list(range(1, grad_output.dim()))
    return torch.linalg.vector_norm(
        grad_output, dim=dims, dtype=torch.float32
    ).square()


def variance_at_one_bit(payload):
    """Mean variance of each sample's elements, stated at one bit.

    Args:
        payload (QuantizedTensor): Payload with the ranges of its groups.

    Returns:
        Tensor[N]: float32.
    """
    format = payload.format
    rotated = format.drawn is not None and format.drawn.rotated
    # Also where a tensor of the model has samples that are not rotated: bits
    # are compared by one curve, which is undone at the bits in force.
    scale = relative_variance(format.bits, rotated)
    return _variance(payload, rotated).mean(1) / scale


def _variance(payload, rotated):
    """Mean variance of the elements of each group (Tensor[N, G])."""
    low, steps = payload.ranges.float().unbind(-1)
    squares = steps.square()
    variance = squares / 6
    if payload.format.drawn is not None:
        variance = torch.where(low == 0, variance, variance / 2)
    row_numel = payload.format.size[1:].numel()
    for bits in STEPS if rotated else ():
        if not rotates(row_numel, bits):
            continue
        share = squares * _rotated_variance(bits)
        if payload.row_bits is not None:
            own = payload.row_bits.unsqueeze(1) == bits
            variance = torch.where(own, share, variance)
        elif payload.format.bits == bits:
            variance = share
    return variance


def _rotated_variance(bits):
    """Variance of elements of a rotated group over its squared scale.

    What is decoded, less the mean, is the product of ``scale``, of three
    Hadamard matrices of order 16 and of the odd numbers q, of the squared
    norm ``scale ** 2 * 16 ** 3 * <q, q>``. For normally
    distributed coefficients of variance 1 the levels ``step / 2 * q`` have
    the mean square ``1 - D``. Of the norm the share D is an error, and of
    that a 256th the error of an element.
    """
    error = SQUARED_ERRORS[bits]
    mean_square = 4 * (1 - error) / STEPS[bits] ** 2  # of q
    return 16**3 * mean_square * error


def weight_gradient_variance(payload, grad_norms, fan):
    """Variance of a weight's gradient that is linear in the kept input.

    ``sum_n v_n * fan * |g_n|^2``: every element of the input meets every
    gradient that its windows reach (ActNN, arXiv:2104.14129, Sec. 3.2).

    Args:
        payload (QuantizedTensor): The input.
        grad_norms (Tensor[N]): From :func:`squared_norms` of the output.
        fan (float): Products of an input with an output gradient, an element
            of the output gradient: ``C_in / groups * kernel elements`` of a
            convolution.

    Returns:
        Tensor[]: float32, at one bit.
    """
    return fan * (variance_at_one_bit(payload) * grad_norms).sum()


def batch_norm_variance(
    payload, grad_output, grad_input, grad_weight, weight, invstd
):
    """Variance from rounding the input of a batch normalisation.

    With x^ the normalised input, its gradient is
    ``w * s * (dy - mean(dy) - x^ * mean(dy * x^))`` over n elements a
    channel. Noise of variance v in x^ enters it directly, times
    ``mean(dy * x^)``, and through that mean, times x^. Both add
    ``w^2 * s^2 * v / n * (dgamma^2 + |dy|^2)`` to its squared norm.

    Args:
        payload (QuantizedTensor): The input.
        grad_output (Tensor[N, C, *]): Gradient of the output.
        grad_input (Tensor[N, C, *], optional): Gradient of the input; None
            where it is exact, as with given statistics.
        grad_weight (Tensor[C], optional): Gradient of the weight.
        weight (Tensor[C], optional): The weight.
        invstd (Tensor[C]): s.

    Returns:
        tuple[Tensor, Tensor]: Variance of the weight's gradient; variance of
        the input's gradient relative to its squared norm. Both Tensor[],
        float32, at one bit.
    """
    dims = dims_but_channels(grad_output)
    scale = invstd.float().square()
    squares = torch.linalg.vector_norm(
        grad_output, dim=dims, dtype=torch.float32
    ).square()
    variance = variance_at_one_bit(payload).mean()
    own = variance * (scale * squares).sum()
    if grad_input is None or grad_weight is None:
        return own, torch.zeros_like(own)
    count = grad_output.numel() / max(grad_output.shape[1], 1)
    gain = scale.square()
    if weight is not None:
        gain = gain * weight.float().square()
    added = gain * (grad_weight.float().square() + squares)
    norm = torch.linalg.vector_norm(grad_input, dtype=torch.float32).square()
    return own, variance * added.sum() / count / norm.clamp(min=1e-30)
