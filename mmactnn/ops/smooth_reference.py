"""Smooth activations in plain torch: specification and test oracle.

Derivatives are autograd's in float64, so that codes of a derivative may
differ from those of the kernels by one where it lies close to where rounding
changes.
"""

import math

import torch
import torch.nn.functional as F

from . import reference

_FLAGGED = 256


def _hardsigmoid(x):
    inside = (x > -3) & (x < 3)
    outside = (x >= 3).to(x.dtype).where(~x.isnan(), x.detach())
    return torch.where(inside, (x + 3) / 6, outside)


# By number, of the argument and the two parameters; of functions that torch
# differentiates as often as needed.
FUNCTIONS = (
    lambda x, a, b: x * (0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    lambda x, a, b: (
        0.5
        * x
        * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    lambda x, a, b: x * torch.sigmoid(x),
    lambda x, a, b: x * torch.tanh(F.softplus(x, threshold=100.0)),
    lambda x, a, b: x * _hardsigmoid(x),
    lambda x, a, b: torch.where(x > 0, x, a * torch.expm1(x.clamp(max=0))),
    lambda x, a, b: torch.sigmoid(x),
    lambda x, a, b: torch.tanh(x),
    lambda x, a, b: torch.where(
        x * a > b, x, torch.log1p(torch.exp((x * a).clamp(max=b))) / a
    ),
    lambda x, a, b: _hardsigmoid(x),
    lambda x, a, b: x.clamp(a, b),
)


def derivatives(x, smooth, order):
    """A function and its derivatives.

    Args:
        x (Tensor[*]): Arguments.
        smooth (Smooth): The function.
        order (int): Of the last derivative.

    Returns:
        list[Tensor[*]]: float64, the value first.
    """
    leaf = x.detach().double().requires_grad_()
    with torch.enable_grad():
        found = [FUNCTIONS[smooth.function](leaf, *smooth.parameters)]
        for _ in range(order):
            last = found[-1]
            grad = None
            if last.requires_grad:
                (grad,) = torch.autograd.grad(
                    last.sum(), leaf, create_graph=True, allow_unused=True
                )
            found.append(torch.zeros_like(leaf) if grad is None else grad)
    return [value.detach() for value in found]


def _in_memory_order(tensor):
    return tensor.as_strided((tensor.numel(),), (1,))


def _range(smooth, bits, device):
    low, high = smooth.low, smooth.high
    step = (high - low) / (2**bits - 1)
    return torch.tensor([low, step], dtype=torch.float32, device=device)


def _random(numel, drawn, device):
    return reference._random16(
        1,
        numel,
        _FLAGGED,
        drawn.seed,
        reference._moved(drawn.offset, drawn.offset_tensor),
        device,
    )


def smooth_derivative(input, smooth, bits, drawn):
    """Specification of :func:`mmactnn.ops.smooth_derivative`.

    Args:
        input (Tensor[*]): Dense.
        smooth (Smooth): The function.
        bits (int): Bits a code.
        drawn (DrawnBits): Random bits.
    """
    numel = input.numel()
    blocks, flags = -(-numel // 8), -(-numel // _FLAGGED)
    flat = _in_memory_order(input)
    derivative = derivatives(flat, smooth, 1)[1].float()
    groups = derivative.new_zeros(flags * _FLAGGED)
    groups[:numel] = derivative
    groups = groups.view(flags, _FLAGGED)
    low, step = _range(smooth, bits, input.device)
    codes = reference._round(
        groups, low, step, 2**bits - 1, _random(numel, drawn, input.device)
    )
    codes.view(-1)[numel:] = 0
    packed = reference._pack(codes.view(1, -1)[:, : blocks * 8], bits)
    special = (~groups.isfinite()).any(1).to(torch.uint8)
    return torch.cat([packed.view(-1), special])


def smooth_derivative_backward(grad_output, codes, smooth, bits, drawn=None):
    """Specification of :func:`mmactnn.ops.smooth_derivative_backward`."""
    numel = grad_output.numel()
    blocks, flags = -(-numel // 8), -(-numel // _FLAGGED)
    code = reference._unpack(codes[: blocks * bits].view(1, -1), bits)
    code = code.view(-1)[:numel]
    low, step = _range(smooth, bits, codes.device)
    random = None
    if drawn is not None:
        random = _random(numel, drawn, codes.device).view(-1)[:numel]
    derivative = reference._decode(code, low, step, 2**bits - 1, random)
    special = codes[blocks * bits :].repeat_interleave(_FLAGGED)[:numel] != 0
    assert len(codes) == blocks * bits + flags
    derivative = torch.where(special, float('nan'), derivative)
    flat = _in_memory_order(grad_output).float() * derivative
    out = torch.empty_like(grad_output)
    _in_memory_order(out).copy_(flat)
    return out


def smooth_decoded(
    codes,
    ranges,
    size,
    stride,
    smooth,
    bits,
    group_size,
    drawn=None,
    weight=None,
    bias=None,
):
    """Value and derivative of which the argument was kept as codes.

    Both are those of :func:`mmactnn.ops.smooth_decode` and of
    :func:`mmactnn.ops.smooth_decode_backward`, before they are rounded.

    Returns:
        tuple[Tensor[N, *], Tensor[N, *]]: float64.
    """
    out = torch.empty_strided(size, stride, device=codes.device)
    decoded = reference._decode_plain(
        codes,
        ranges,
        out,
        bits,
        group_size,
        drawn,
        lambda low: torch.ones_like(low, dtype=torch.bool),
    ).double()
    step = ranges[..., 1].double().repeat_interleave(group_size, 1)
    variance = step.nan_to_num(0).square() * (1 / 12 if drawn else 1 / 6)
    half = reference._per_element(variance[:, : out[:1].numel()] / 2, out)
    if weight is not None:
        scale = reference._channels(weight.double(), out)
        decoded, half = decoded * scale, half * scale.square()
    if bias is not None:
        decoded = decoded + reference._channels(bias.double(), out)
    value, first, second, third = derivatives(decoded, smooth, 3)
    exact = half == 0
    return (
        torch.where(exact, value, value - half * second),
        torch.where(exact, first, first - half * third),
    )
