"""Convolution, normalisation and a smooth activation with one payload."""

import copy
import math

import pytest
import torch
from support.layers import gradients, relative_error, saved_tensors
from support.pairs import in_turn
from torch import nn

from mmactnn import convert_model, measure_activations
from mmactnn.codes.payload import SmoothTensor

ACTS = {
    'SiLU': nn.SiLU,
    'SiLU, in place': lambda: nn.SiLU(inplace=True),
    'GELU': nn.GELU,
    'Mish': nn.Mish,
}


class Block(nn.Module):
    """As MMCV's ``ConvModule``."""

    def __init__(self, act, affine=True, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)
        self.act = act
        if affine:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def make_pair(device, act='SiLU', level='L2', affine=True):
    torch.manual_seed(0)
    plain = nn.Sequential(
        Block(ACTS[act](), affine), Block(ACTS[act]()), nn.Conv2d(8, 4, 1)
    ).to(device)
    model = copy.deepcopy(plain)
    report = convert_model(model, level)
    return plain, model, report


def images(device, last=False):
    x = torch.randn(4, 8, 16, 16, device=device)
    return x.to(memory_format=torch.channels_last) if last else x


@in_turn(act=tuple(ACTS), affine=[True, False], last=[False, True])
def test_computes_as_the_calls(act, affine, last, device):
    level = dict(base='L2', conv=8, act=8)
    plain, model, report = make_pair(device, act, level, affine)
    assert [item.patterns for item in report.fused] == [('norm_smooth',)] * 2
    x = images(device, last)
    grad_output = torch.randn(4, 4, 16, 16, device=device)
    expected = gradients(plain, x, grad_output)
    found = gradients(model, x, grad_output)
    assert relative_error(found['output'], expected['output']) < 1e-4
    for key in expected:
        assert relative_error(found[key], expected[key]) < 0.06, key
    for (key, a), (_, b) in zip(plain.named_buffers(), model.named_buffers()):
        assert torch.allclose(a, b, atol=1e-6), key


def test_one_payload_for_three(device):
    _, model, _ = make_pair(device)
    x = images(device)
    with measure_activations(model) as meter:
        model(x)
    with saved_tensors() as saved:
        model(x)
    numel = x.numel()
    codes = [t for t in saved if t is not None and t.dtype == torch.uint8]
    sizes = {t.data_ptr(): t.nbytes for t in codes}
    # The image, and one for each block: 4 bits an element.
    assert sorted(sizes.values()) == [numel // 2] * 3
    output = model[0](x)
    payload = model[0].act.quantizer.cache.get(output)
    assert type(payload) is SmoothTensor
    assert relative_error(payload.unpack(), output) < 0.15
    assert torch.equal(payload.unpack(1, 3), payload.unpack()[1:3])
    # Torch: inputs of convolutions, normalisations and activations.
    assert meter.exact_bytes > 7 * numel * 4
    assert meter.saved_bytes < 3 * numel * 4 / 8 * 1.1


@in_turn(last=[False, True])
def test_little_bias(last, device):
    plain, model, _ = make_pair(device, level=dict(base='L2', act=4))
    x = images(device, last)
    grad_output = torch.randn(4, 4, 16, 16, device=device)
    expected = gradients(plain, x, grad_output)
    draws = [gradients(model, x, grad_output) for _ in range(32)]
    for key in ('input', '0.norm.weight', '1.conv.weight', '2.weight'):
        one = relative_error(draws[0][key], expected[key])
        mean = torch.stack([draw[key] for draw in draws]).mean(0)
        rest = relative_error(mean, expected[key])
        assert 0.005 < one < 0.4
        assert rest < 2 * one / math.sqrt(32), key


@in_turn(dtype=[torch.float16, torch.bfloat16])
def test_autocast(dtype, device):
    plain, model, _ = make_pair(device, level=dict(act=8))
    x = images(device)

    def run(module):
        with torch.autocast(device.type, dtype):
            return gradients(module, x, None)

    found, expected = run(model), run(plain)
    assert found['output'].dtype == dtype
    assert relative_error(found['output'], expected['output']) < 0.02
    assert relative_error(found['2.weight'], expected['2.weight']) < 0.05


def test_hooks_see_their_layers(device):
    plain, model, _ = make_pair(device)
    seen = []
    for module in (plain, model):
        for name in ('norm', 'act'):
            layer = getattr(module[0], name)
            layer.register_forward_hook(
                lambda _, args, out: seen.append(out.detach())
            )
    x = images(device)
    plain(x), model(x)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1], seen[3], rtol=1e-4, atol=1e-5)


@in_turn(how=['eval', 'L0', 'without grad'])
def test_exact(how, device):
    plain, model, _ = make_pair(device, level='L0' if how == 'L0' else 'L2')
    x = images(device)
    if how == 'eval':
        plain.eval(), model.eval()
    with torch.set_grad_enabled(how != 'without grad'):
        assert torch.equal(model(x), plain(x))


def test_running_statistics(device):
    plain, model, _ = make_pair(device, level=dict(act=8))
    x = images(device)
    for module in (plain, model):
        module.train()
        for block in module[:2]:
            block.norm.eval()
    expected = gradients(plain, x, None)
    found = gradients(model, x, None)
    assert relative_error(found['output'], expected['output']) < 1e-4
    for key in ('input', '1.norm.weight', '2.weight'):
        assert relative_error(found[key], expected[key]) < 0.05


@in_turn(settings=[dict(joint_act=False), dict(rounding='stochastic')])
def test_without_one_code(settings, device):
    plain, model, _ = make_pair(device, level=dict(base='L2', **settings))
    x = images(device)
    output = model[0](x)
    cache = model[0].act.quantizer.cache
    assert cache.get(output) is None
    torch.testing.assert_close(output, plain[0](x), rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused(device):
    _, model, _ = make_pair(device)
    x = images(device).requires_grad_()
    loss = model(x).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiated twice'):
        grad.sum().backward()


def test_other_activations_are_left(device):
    model = nn.Sequential(Block(nn.Hardswish()), Block(nn.Sigmoid()))
    report = convert_model(model, 'L2')
    assert not report.fused
