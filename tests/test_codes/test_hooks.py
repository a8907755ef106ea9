"""Saved-tensor hooks decide whether codes are decoded with dither."""

import pytest
import torch
from support.layers import rounding_variance
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mmactnn
from mmactnn import QConv2d, RoundingGenerator, convert_model
from mmactnn.codes.hooks import keep_tensors
from mmactnn.codes.quantizer import LayerQuantizer


def identity(tensor):
    return tensor


def identity_that_keeps(tensor):
    return tensor


identity_that_keeps.keeps_tensors = True


def test_hooks_say_what_they_do():
    assert keep_tensors()
    with saved_tensors_hooks(identity, identity):
        assert not keep_tensors()
        with saved_tensors_hooks(identity_that_keeps, identity):
            assert keep_tensors()
        assert not keep_tensors()
    assert keep_tensors()


def test_hooks_of_a_meter_keep_tensors():
    found = []
    model = torch.nn.Sequential(QConv2d(3, 4, 1))
    convert_model(model, 'L2')

    def look(module, args):
        payload = module[0].quantizer.pack(args[0])
        found.append(payload.format.drawn is not None)

    model.register_forward_pre_hook(look)
    with mmactnn.measure_activations(model):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert found == [True]


def test_hooks_of_swapping_keep_tensors():
    assert mmactnn.offload.engine.SwapEngine.pack.keeps_tensors


@pytest.mark.parametrize('reentrant', [False, True])
def test_variance_in_a_checkpointed_block(reentrant, device):
    """Where codes come from a second pass, they are decoded alone."""
    conv = QConv2d(4, 6, 1, bias=False, bits=2).to(device)
    conv.quantizer.generator = RoundingGenerator(seed=1)
    x = torch.randn(3, 4, 9, 10, device=device, requires_grad=True)
    grad = torch.randn(3, 6, 9, 10, device=device)
    count, draws = 512, []
    for _ in range(count):
        output = checkpoint(conv, x, use_reentrant=reentrant)
        # torch.autograd.grad does not run reentrant blocks again.
        conv.weight.grad = None
        output.backward(grad)
        draws.append(conv.weight.grad.flatten().double())
    draws = torch.stack(draws)
    rounding = 'dither' if reentrant else 'stochastic'
    payload = LayerQuantizer(2, rounding=rounding).pack(x.detach())
    noise = rounding_variance(x, payload)
    expected = torch.einsum('nohw,nchw->oc', grad.double() ** 2, noise)
    ratio = draws.var(0) / expected.flatten()
    # A ratio is a chi-squared variable of 511 degrees over 511.
    assert abs(ratio.mean() - 1) < 0.05
    exact = torch.nn.grad.conv2d_weight(x, conv.weight.shape, grad)
    z = draws.mean(0) - exact.flatten().double()
    z /= (expected.flatten() / count).sqrt()
    assert z.abs().max() < 4.5
