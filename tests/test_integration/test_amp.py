"""Mixed precision: what is kept, and that overflow shows."""

import pytest
import torch
import torch.nn.functional as F
from support.precision_cases import batch, make_net
from torch import nn

from mmactnn import (
    RoundingGenerator,
    convert_model,
    get_precision,
    measure_activations,
)

LAYERS = {
    'conv': lambda: nn.Conv2d(4, 4, 3),
    'transposed conv': lambda: nn.ConvTranspose2d(4, 4, 3),
    'linear': lambda: nn.Linear(6, 4),
    'batch norm': lambda: nn.BatchNorm2d(4),
    'sync norm': lambda: nn.SyncBatchNorm(4),
    'group norm': lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize('value', [float('inf'), float('nan')], ids=str)
@pytest.mark.parametrize('level', ['L2', 'L3'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', LAYERS)
def test_overflow_reaches_the_gradient(name, dtype, level, value, device):
    if name == 'sync norm' and device.type == 'cpu':
        pytest.skip('as batch norm in one process on the CPU')
    model = nn.Sequential(LAYERS[name]()).to(device)
    convert_model(model, level, generator=RoundingGenerator(1))
    x = torch.randn(3, 4, 6, 6, device=device)
    x[1, 2, 3, 4] = value
    with torch.autocast(device.type, dtype):
        loss = model(x).float().sum()
    loss.backward()
    assert not model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_compression_against_exact_amp(dtype, device):
    if device.type == 'cpu' and dtype == torch.float16:
        pytest.skip('float16 training is for GPUs')
    kept = {}
    for level in ('L0', 'L3'):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
        ).to(device)
        convert_model(model, level)
        x = torch.randn(4, 8, 32, 32, device=device)
        with measure_activations(model) as meter:
            with torch.autocast(device.type, dtype):
                loss = model(x).float().mean()
        loss.backward()
        kept[level] = meter
    # float16 inputs, no float32 copies: about 2 of 16 bits, twice, and 1.
    assert kept['L0'].saved_bytes > 5 * kept['L3'].saved_bytes
    assert kept['L3'].exact_bytes == pytest.approx(
        kept['L0'].saved_bytes, rel=0.1
    )


def test_precision_goes_on_after_an_overflow(device):
    net = make_net().to(device)
    for step in range(6):
        x = batch(step, device=device)
        if step in (0, 1):
            x = x * float('inf')
        with torch.autocast(device.type, torch.bfloat16):
            loss = net(x).float().square().mean()
        net.zero_grad()
        loss.backward()
    bits = get_precision(net).bits
    assert len(set(bits.values())) > 1


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='GradScaler is for GPUs'
)
def test_scaler_skips_the_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).cuda()
    convert_model(net, 'L3')
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler('cuda')
    before = net[0].weight.detach().clone()
    x = torch.randn(4, 3, 8, 8, device='cuda')
    x[0, 0, 0, 0] = float('inf')
    with torch.autocast('cuda', torch.float16):
        loss = F.relu(net(x)).float().mean()
    scale = scaler.get_scale()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net[0].weight, before)
    assert scaler.get_scale() == scale / 2
