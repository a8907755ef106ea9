"""Payloads that follow tensors through views and movements."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.layers import (
    assert_same_bits,
    count_packs,
    relative_error,
)
from torch import nn

from mmactnn import RoundingGenerator, convert_model, measure_activations
from mmactnn.codes.moved import MovedTensor
from mmactnn.functional import settings_of


class Moved(nn.Module):
    """A normalisation, a movement, and a linear layer."""

    def __init__(self, move, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.move = move
        self.fc = nn.Linear(width, 8)
        self.moved = None

    def forward(self, x):
        y = self.norm(x)
        self.moved = self.move(y)
        return self.fc(self.moved)


def windows(x):
    """Windows of a shifted and padded map, as in Swin."""
    x = F.pad(x.view(-1, 6, 6, 32), (0, 0, 0, 2, 0, 2))
    x = torch.roll(x, shifts=(-2, -2), dims=(1, 2))
    x = x.view(-1, 2, 4, 2, 4, 32).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, 16, 32)


MOVES = {
    'window partition': windows,
    'view': lambda x: x.view(-1, 32),
    'reshape': lambda x: x.reshape(9, -1, 32),
    'permute': lambda x: x.permute(1, 0, 2),
    'transpose': lambda x: x.transpose(0, 1).contiguous(),
    'flatten': lambda x: x.flatten(0, 1),
    'unflatten': lambda x: x.unflatten(1, (6, 6)),
    'roll': lambda x: x.roll(3, 1),
    'negative pad': lambda x: F.pad(x, (0, 0, -1, 2)),
    'a token': lambda x: x[:, 0],
    'a slice': lambda x: x[1:, ::2],
    'an added dimension': lambda x: x.unsqueeze(1),
    'squeeze': lambda x: x[:1].squeeze(0),
    'chunk': lambda x: x.chunk(3, dim=1)[1],
    'split': lambda x: x.split([10, 26], dim=1)[0],
    'unbind': lambda x: x.unbind(0)[2],
    'functions of torch': lambda x: torch.flip(torch.movedim(x, 0, 1), (0,)),
    'clone': lambda x: x.clone(),
    'there and back': lambda x: x.mT.mT,
}


def make(move, bits=3):
    model = Moved(move)
    with torch.no_grad():
        for parameter in model.norm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    convert_model(
        model,
        dict(base='L3', rules={'norm': bits}),
        generator=RoundingGenerator(seed=0),
    )
    return model


def make_input(device='cpu'):
    return torch.randn(4, 36, 32, device=device).requires_grad_()


@pytest.mark.parametrize('name', MOVES)
def test_payload_follows(device, name, monkeypatch):
    """The weight's gradient is that of the payload, moved likewise."""
    model = make(MOVES[name]).to(device)
    packed = count_packs(monkeypatch)
    output = model(make_input(device))
    assert len(packed) == 1
    payload = settings_of(model).cache.get(model.moved)
    decoded = payload.unpack()
    assert payload.format.size == decoded.shape == model.moved.shape
    assert decoded.dtype == model.moved.dtype
    # At 3 bits; a wrong place would show by an error of 1.
    assert relative_error(decoded, model.moved) < 0.3
    assert_same_bits(payload.unpack(1, 2), decoded[1:2])
    pieces = [values for _, values in payload.chunks(1000)]
    assert_same_bits(torch.cat(pieces), decoded)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    expected = grad_output.reshape(-1, 8).t() @ decoded.reshape(-1, 32)
    torch.testing.assert_close(model.fc.weight.grad, expected)


def test_nothing_new_is_kept():
    models = [make(lambda x: x), make(windows)]
    saved = []
    for model in models:
        x = make_input()
        with measure_activations(model) as meter:
            model(x)
        saved.append(meter.saved_bytes)
    assert saved[0] == saved[1]


def test_unbiased():
    torch.manual_seed(0)
    model = Moved(windows)
    exact = copy.deepcopy(model).double()
    convert_model(model, 'L3', generator=RoundingGenerator(seed=0))
    x = torch.randn(4, 36, 32)
    weights = torch.randn(16, 16, 8)

    def run(module, dtype):
        module.zero_grad()
        leaf = x.to(dtype, copy=True).requires_grad_()
        (module(leaf) * weights.to(dtype)).sum().backward()
        return module.fc.weight.grad.double()

    expected = run(exact, torch.float64)
    draws = torch.stack([run(model, torch.float32) for _ in range(32)])
    single = (draws - expected).flatten(1).norm(dim=1).mean()
    mean = (draws.mean(0) - expected).norm()
    assert single > 0 and mean / single * math.sqrt(32) < 1.3


@pytest.mark.parametrize('casts', ['to', 'autocast'])
def test_casts(casts, monkeypatch):
    dtype = torch.bfloat16
    move = windows if casts == 'autocast' else lambda x: windows(x).to(dtype)
    model = make(move, bits=8)
    twin = copy.deepcopy(model)
    convert_model(twin, 'L0')
    packed = count_packs(monkeypatch)
    found = []
    for module in (model, twin):
        if casts == 'to':
            module.fc.to(dtype)
        torch.manual_seed(0)
        x = make_input()
        with torch.autocast('cpu', dtype, enabled=casts == 'autocast'):
            output = module(x)
        output.square().sum().backward()
        found.append((output, module.fc.weight.grad))
    assert len(packed) == 1
    assert_same_bits(found[0][0], found[1][0])
    assert relative_error(found[0][1], found[1][1]) < 0.05


@pytest.mark.parametrize(
    'change',
    [
        lambda x: x.view(-1, 32) + 1,
        lambda x: x.view(-1, 32).mul_(2),
        lambda x: x[torch.tensor([2, 1])],
        lambda x: x.detach().view(-1, 32),
        lambda x: torch.cat([x, x]),
    ],
)
def test_changed_values_have_payloads_of_their_own(change, monkeypatch):
    model = make(change)
    packed = count_packs(monkeypatch)
    model(make_input())
    assert len(packed) == 2


def test_written_source(monkeypatch):
    """A view of a tensor that is written to later has no payload any more."""

    def move(x):
        y = x.view(-1, 32)
        x.add_(1)
        return y

    model = make(move)
    packed = count_packs(monkeypatch)
    model(make_input())
    assert len(packed) == 2


def test_convolutions_decode_moved_payloads(monkeypatch):
    """A rectified map that is cropped; the convolution decodes pieces."""

    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.conv = nn.Conv2d(8, 4, 3)

        def forward(self, x):
            x = self.norm(x).permute(0, 3, 1, 2)
            return self.conv(x[:, :, 1:])

    model = Crops()
    convert_model(model, dict(base='L3', rules={'norm': 8}, chunk_mib=0.001))
    twin = copy.deepcopy(model)
    convert_model(twin, 'L0')
    packed = count_packs(monkeypatch)
    x = torch.randn(3, 9, 9, 8)
    grads = []
    for module in (model, twin):
        module(x.clone().requires_grad_()).square().sum().backward()
        grads.append(module.conv.weight.grad)
    assert len(packed) == 1
    assert relative_error(*grads) < 0.02


def test_movements_are_joined():
    model = make(windows)
    model(make_input())
    payload = settings_of(model).cache.get(model.moved)
    assert type(payload) is MovedTensor
    assert payload.source.format.kind == 'normalised'
    assert len(payload.movements) == 7
