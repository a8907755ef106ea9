"""Max pooling with 4-bit positions against torch and its specification."""

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
WINDOWS = {
    'halving': dict(kernel_size=2),
    'stem': dict(kernel_size=3, stride=2, padding=1),
    'overlapping': dict(kernel_size=3, stride=1, padding=1),
    'ceil_mode': dict(kernel_size=3, stride=2, ceil_mode=True),
    # The last window would begin past the input.
    'ceil_mode, gaps': dict(kernel_size=2, stride=3, ceil_mode=True),
    'dilated': dict(kernel_size=3, stride=2, padding=1, dilation=2),
    'oblong': dict(
        kernel_size=(1, 5), stride=(2, 3), padding=(0, 2), dilation=(1, 3)
    ),
    'gaps': dict(kernel_size=2, stride=3),
    '16 taps': dict(kernel_size=4, stride=1, padding=2),
    'one tap': dict(kernel_size=1),
}
SHAPES = (
    (2, 3, 9, 11),
    (3, 9, 11),
    (0, 3, 9, 11),
    (2, 8, 8, 16),
    (1, 1, 9, 9),
)


def make(shape, dtype, device, channels_last=False):
    """With ties, NaN, inf, and windows of nothing but -inf."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator).mul(2).round()
    if x.numel():
        plane = x.view(-1, *shape[-2:])
        plane[0, :5, :5] = -math.inf
        plane[-1, 3, 3:6] = math.nan
        plane[-1, 4, 4] = math.inf
        plane[-1, 6, 2] = -0.0
    x = x.to(device, dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x


def assert_same(actual, expected):
    """Equal in every bit, but one NaN is as good as another."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True
    )
    assert_same_bits(actual.nan_to_num(), expected.nan_to_num())


@in_turn(
    where=lambda shape, channels_last, **_: (
        len(shape) == 4 or not channels_last
    ),
    by='name',
    name=tuple(WINDOWS),
    shape=SHAPES,
    dtype=DTYPES,
    channels_last=[False, True],
)
def test_forward_and_backward(name, shape, dtype, channels_last, device):
    window = WINDOWS[name]
    x = make(shape, dtype, device, channels_last)
    twin = x.clone().requires_grad_()
    expected, places = F.max_pool2d(twin, **window, return_indices=True)

    output, indices, format = ops.max_pool2d(x, **window)
    assert output.stride() == expected.stride()
    assert_same(output, expected)
    assert indices.shape == ((output.numel() + 1) // 2,)
    specified = reference.max_pool2d(x.cpu(), format, output.shape[-2:])
    assert_same(output.cpu(), specified[0])
    assert torch.equal(indices.cpu(), specified[1])

    # Small integers: their sums are exact in every order and dtype.
    grad = torch.randint_like(output, -3, 4)
    if device.type == 'cuda':
        # In channels_last torch gives the gradient of a window that holds
        # -inf alone to a value outside of it. (One channel is both layouts,
        # unless it is cloned.)
        twin = x.detach().clone(memory_format=torch.contiguous_format)
        twin.requires_grad_()
        expected = F.max_pool2d(twin, **window)
    expected.backward(grad)
    grad_input = ops.max_pool2d_backward(grad, indices, format)
    if x.numel():
        assert grad_input.stride() == x.stride()
    # The sum of nothing is 0, and so is that of two zeros but one sign.
    torch.testing.assert_close(grad_input, twin.grad, rtol=0, atol=0)
    torch.testing.assert_close(
        grad_input.cpu(),
        reference.max_pool2d_backward(grad.cpu(), indices.cpu(), format),
        rtol=0,
        atol=0,
    )


@in_turn(name=['halving', 'gaps', 'one tap'], dtype=DTYPES)
def test_gradient_without_overlap(name, dtype, device):
    x = make((2, 3, 9, 11), dtype, device).requires_grad_()
    expected = F.max_pool2d(x, **WINDOWS[name])
    grad = torch.randn_like(expected)
    expected.backward(grad)
    _, indices, format = ops.max_pool2d(x.detach(), **WINDOWS[name])
    assert_same_bits(ops.max_pool2d_backward(grad, indices, format), x.grad)


@pytest.mark.parametrize(
    'stride', [(8, 1, 1, 1), (8, 1, 8, 8)], ids=['contiguous', 'channels_last']
)
def test_layouts_that_the_input_does_not_tell(stride, device):
    # One pixel a channel: both layouts at once, but not so its output.
    x = torch.randn(2, 8, device=device).as_strided((2, 8, 1, 1), stride)
    x = x.requires_grad_()
    expected = F.max_pool2d(x, 2, 1, 1)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    output, indices, format = ops.max_pool2d(x.detach(), 2, 1, 1)
    assert output.stride() == expected.stride()
    assert_same_bits(output, expected)
    torch.testing.assert_close(
        ops.max_pool2d_backward(grad, indices, format), x.grad
    )


def test_windows_without_any_element(device):
    # Both taps of every window lie outside.
    x = torch.randn(1, 2, 3, 2, device=device)
    window = dict(kernel_size=(1, 2), stride=1, padding=(0, 1), dilation=3)
    output, indices, format = ops.max_pool2d(x, **window)
    assert output.shape == (1, 2, 3, 1)
    assert (output == -math.inf).all()
    grad = ops.max_pool2d_backward(torch.ones_like(output), indices, format)
    assert not grad.any()


@pytest.mark.parametrize('channels_last', [False, True])
def test_opcheck(channels_last, device):
    x = make((2, 3, 9, 11), torch.float32, device, channels_last)
    window = ([3, 3], [2, 2], [1, 1], [1, 1])
    arguments = (x.nan_to_num(), *window, [5, 6], channels_last)
    op = torch.ops.mmactnn.max_pool2d.default
    opcheck(op, arguments)
    output, indices = op(*arguments)
    opcheck(
        torch.ops.mmactnn.max_pool2d_backward.default,
        (output, indices, *window, [9, 11], channels_last),
    )


def test_too_many_taps(device):
    x = torch.zeros(1, 1, 9, 9, device=device)
    with pytest.raises(RuntimeError, match='at most 16 taps, got 25'):
        ops.max_pool2d(x, 5)


def test_arguments_that_do_not_belong_together(device):
    x = torch.zeros(1, 2, 8, 8, device=device)
    output, indices, format = ops.max_pool2d(x, 2)
    with pytest.raises(RuntimeError, match='16 bytes'):
        ops.max_pool2d_backward(output, indices[1:], format)
    with pytest.raises(RuntimeError, match='inside of the padded input'):
        ops.max_pool2d_backward(
            output, indices, format._replace(input_size=(6, 8))
        )
    with pytest.raises(RuntimeError, match='memory format'):
        ops.max_pool2d_backward(
            output, indices, format._replace(channels_last=True)
        )


@pytest.mark.parametrize(
    ('shape', 'window'),
    [
        ((8, 8), dict(kernel_size=2)),
        ((1, 2, 8, 8), dict(kernel_size=2, padding=2)),
        ((1, 2, 8, 8), dict(kernel_size=9)),
        ((1, 2, 8, 8), dict(kernel_size=2, stride=0)),
        ((1, 2, 8, 8), dict(kernel_size=(2, 2, 2))),
        ((1, 2, 0, 8), dict(kernel_size=2)),
    ],
)
def test_errors_of_torch(shape, window, device):
    x = torch.zeros(shape, device=device)
    with pytest.raises(RuntimeError) as expected:
        F.max_pool2d(x, **window)
    with pytest.raises(RuntimeError) as found:
        ops.max_pool2d(x, **window)
    assert str(found.value) == str(expected.value)


def test_unknown_dtype(device):
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match='float64'):
        ops.max_pool2d(x, 2)
