"""Rectifiers with a one-bit mask against torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same_bits
from support.opcheck import opcheck
from support.pairs import in_turn

from mmactnn import ops
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((0, 4), (1,), (7,), (8,), (3, 5, 7, 11), (2, 16, 8, 8))
# torch's function, and the arguments that make ours the same.
RECTIFIERS = {
    'relu': (torch.relu, {}),
    'relu6': (F.relu6, dict(max=6.0)),
    'leaky_relu': (lambda x: F.leaky_relu(x, 0.1), dict(slope=0.1)),
    'leaky_relu of slope 0': (lambda x: F.leaky_relu(x, 0), dict(slope=0.0)),
    'leaky_relu of slope -1': (lambda x: F.leaky_relu(x, -1), dict(slope=-1)),
}


def make(shape, dtype, device):
    generator = torch.Generator().manual_seed(5)
    x = 4 * torch.randn(shape, generator=generator)
    if x.numel() > 6:
        special = [0.0, -0.0, math.nan, math.inf, -math.inf, 6.0]
        x.view(-1)[:6] = torch.tensor(special)
    return x.to(device, dtype)


@in_turn(
    where=lambda shape, channels_last, **_: (
        len(shape) == 4 or not channels_last
    ),
    by='name',
    name=tuple(RECTIFIERS),
    shape=SHAPES,
    dtype=DTYPES,
    inplace=[False, True],
    channels_last=[False, True],
)
def test_forward_and_backward(
    name, shape, dtype, inplace, channels_last, device
):
    function, arguments = RECTIFIERS[name]
    x = make(shape, dtype, device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    nan = x.isnan()
    twin = x.clone().requires_grad_()
    expected = function(twin)
    grad = torch.randn_like(x)
    expected.backward(grad)

    expected_mask = reference.relu_mask(x.cpu(), **arguments)[1]
    if inplace:
        output = x
        mask = ops.relu_mask_(x, **arguments)
    else:
        output, mask = ops.relu_mask(x, **arguments)
    assert output.stride() == x.stride()
    torch.testing.assert_close(
        output, expected.detach(), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(mask.cpu(), expected_mask)
    assert mask.shape == ((x.numel() + 7) // 8,)
    expected = twin.grad
    found = ops.relu_mask_backward(grad, mask, arguments.get('slope'))
    if name == 'relu6':
        # On CPU torch's vectorised loop stops the gradient of NaN, which its
        # scalar loop and its CUDA kernel let pass.
        assert torch.equal(found[nan], grad[nan])
        found, expected = found[~nan], expected[~nan]
    assert_same_bits(found, expected)


def test_pointers_off_the_vector_boundary(device):
    base = make((67,), torch.float16, device)
    for start in range(4):
        x = base[start:]
        output, mask = ops.relu_mask(x)
        expected, expected_mask = reference.relu_mask(x.cpu())
        torch.testing.assert_close(
            output.cpu(), expected, rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(mask.cpu(), expected_mask)


def test_opcheck(device):
    x = torch.randn(3, 5, 7, device=device)
    opcheck(torch.ops.mmactnn.relu_mask.default, (x,))
    opcheck(torch.ops.mmactnn.relu_mask_.default, (x.clone(),))
    mask = ops.relu_mask(x)[1]
    opcheck(torch.ops.mmactnn.relu_mask_backward.default, (x, mask))


def test_mask_that_does_not_fit(device):
    x = torch.randn(17, device=device)
    mask = ops.relu_mask(x)[1]
    with pytest.raises(RuntimeError, match='3 bytes'):
        ops.relu_mask_backward(x, mask[:2])


def test_cap_and_slope_exclude_each_other(device):
    x = torch.randn(17, device=device)
    for op in (ops.relu_mask, ops.relu_mask_):
        with pytest.raises(RuntimeError, match='exclude each other'):
            op(x, max=6.0, slope=0.1)


def test_gaps_in_memory_are_refused_in_place(device):
    x = torch.randn(4, 8, device=device)[:, ::2]
    with pytest.raises(RuntimeError, match='dense in memory'):
        ops.relu_mask_(x)


def test_unknown_dtype(device):
    with pytest.raises(TypeError, match='float64'):
        ops.relu_mask(torch.zeros(3, dtype=torch.float64, device=device))
