"""Normalisation by constants, against float64."""

import pytest
import torch
from support.opcheck import opcheck
from support.pairs import case, in_turn

from mmactnn import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make(size, dtype, device, channels_last=False):
    torch.manual_seed(0)
    x = torch.randn(size, device=device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    count = size[1]
    mean, bias = torch.randn(2, count, device=device).unbind()
    var, weight = (torch.rand(2, count, device=device) + 0.5).unbind()
    return x, (mean.clone(), var.clone(), weight.clone(), bias.clone())


def expect(x, residual, mean, var, weight, bias, eps, relu):
    shape = (1, -1) + (1,) * (x.dim() - 2)

    def spread(tensor):
        return tensor.double().view(shape)

    total = (x.double() - spread(mean)) / (spread(var) + eps).sqrt()
    if weight is not None:
        total = total * spread(weight)
    if bias is not None:
        total = total + spread(bias)
    if residual is not None:
        total = total + residual.double()
    return total.relu() if relu else total


SIZES = [
    (2, 16, 8, 8),
    (3, 5, 7, 3),
    (2, 64, 16, 24),
    (1, 3, 1, 1),
    (4, 12),
    (2, 6, 11),
    (2, 4, 3, 5, 7),
    (2, 1030, 2, 3),
    (300, 32, 24, 24),  # threads of a GPU go on from block to block
]


@in_turn(
    by='size', size=SIZES, dtype=DTYPES, adds=[True, False], relu=[True, False]
)
def test_values(size, dtype, adds, relu, device):
    if device.type == 'cpu':
        size = (min(size[0], 9), *size[1:])
    for channels_last in (False, True)[: 1 + (len(size) == 4)]:
        x, parameters = make(size, dtype, device, channels_last)
        residual = torch.randn_like(x) if adds else None
        expected = expect(x, residual, *parameters, 1e-3, relu)
        strides, error = x.stride(), TOLERANCES[dtype]
        ops.frozen_norm_act_(x, residual, *parameters, 1e-3, relu)
        with case(channels_last=channels_last):
            assert x.stride() == strides
            assert torch.allclose(x.double(), expected, error, error)


@pytest.mark.parametrize(
    'affine', [(True, False), (False, True), (False,) * 2]
)
def test_without_weight_or_bias(affine, device):
    x, (mean, var, *rest) = make((2, 6, 5, 4), torch.float32, device)
    rest = [p if has else None for p, has in zip(rest, affine)]
    expected = expect(x, None, mean, var, *rest, 1e-5, False)
    ops.frozen_norm_act_(x, None, mean, var, *rest, 1e-5, False)
    assert torch.allclose(x.double(), expected, atol=1e-5)


@pytest.mark.parametrize('size', [(2, 7, 9, 5), (2, 8, 8, 8)])
@pytest.mark.parametrize('offset', [1, 4])
def test_memory_that_is_not_aligned(offset, size, device):
    x, parameters = make(size, torch.float16, device)
    memory = torch.zeros(x.numel() + offset + 16, device=device).half()
    view = memory[offset : offset + x.numel()].view(size)
    view.copy_(x)
    expected = expect(x, None, *parameters, 1e-5, True)
    ops.frozen_norm_act_(view, None, *parameters, 1e-5, True)
    assert torch.allclose(view.double(), expected, atol=2e-3, rtol=2e-3)
    assert not memory[:offset].any() and not memory[offset + x.numel() :].any()


def test_many_rows(device):
    x, parameters = make((70_000, 2), torch.float32, device)
    expected = expect(x, None, *parameters, 1e-5, True)
    ops.frozen_norm_act_(x, None, *parameters, 1e-5, True)
    assert torch.allclose(x.double(), expected, atol=1e-5)


def test_nan_and_infinity(device):
    x = torch.tensor([[float('nan'), float('inf'), -float('inf'), -1.0]])
    x = x.to(device)
    one = torch.ones(4, device=device)
    ops.frozen_norm_act_(x, None, 0 * one, one, one, None, 0.0, True)
    assert x[0, 0].isnan()
    assert x[0, 1:].tolist() == [float('inf'), 0.0, 0.0]


def test_empty(device):
    x, parameters = make((0, 4, 3, 3), torch.float32, device)
    ops.frozen_norm_act_(x, None, *parameters, 1e-5, True)


def test_errors(device):
    x, parameters = make((2, 4, 3, 3), torch.float32, device)
    mean, var, weight, bias = parameters

    def run(x=x, residual=None, mean=mean, weight=weight):
        ops.frozen_norm_act_(x, residual, mean, var, weight, bias, 1e-5, True)

    with pytest.raises(ValueError, match='2 to 5 dimensions'):
        run(x=x[0, 0, 0])
    with pytest.raises(TypeError, match='float32, float16 or bfloat16'):
        run(x=x.double())
    with pytest.raises(ValueError, match=r'mean must be of shape \(4,\)'):
        run(mean=mean[:3])
    with pytest.raises(RuntimeError, match='weight must be a contiguous f'):
        run(weight=weight.half())
    with pytest.raises(RuntimeError, match='dtype of input'):
        run(residual=x.half())
    with pytest.raises(RuntimeError, match='shape of input'):
        run(residual=x[:1])
    with pytest.raises(RuntimeError, match='strides of input'):
        run(residual=x.contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match='contiguous or channels_last'):
        run(x=x[..., ::2])


def test_opcheck(device):
    x, parameters = make((2, 4, 3, 3), torch.float32, device)
    for residual in (None, torch.randn_like(x)):
        opcheck(
            torch.ops.mmactnn.frozen_norm_act_.default,
            (x, residual, *parameters, 1e-5, True),
        )


def test_too_many_channels():
    if not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    x, parameters = make((1, 4097), torch.float32, 'cuda')
    with pytest.raises(RuntimeError, match='at most 4096 channels, got 4097'):
        ops.frozen_norm_act_(x, None, *parameters, 1e-5, True)
