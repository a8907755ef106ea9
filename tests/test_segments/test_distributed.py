"""Segments in DistributedDataParallel, with one process."""

import pytest
import torch
import torch.distributed as dist
from support.transformer import Block, relative
from torch import nn

from mmactnn import convert_model
from mmactnn.segments import parts


@pytest.fixture
def group(tmp_path):
    dist.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def gradients(model, net, x):
    for _ in range(3):
        net.zero_grad()
        model(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason='gloo is not available',
)
@pytest.mark.parametrize(
    'options',
    [{}, dict(find_unused_parameters=True), dict(static_graph=True)],
    ids=['plain', 'unused', 'static'],
)
@pytest.mark.parametrize('most', [parts.MAX_BYTES, 1], ids=['', 'parts'])
def test_gradients_arrive(group, options, most, monkeypatch):
    monkeypatch.setattr(parts, 'MAX_BYTES', most)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), Block(), Block(), nn.Linear(64, 4))
    x = torch.randn(4, 32, 16)
    exact = gradients(net, net, x)
    report = convert_model(net, 'L3R', include=['1*', '2*'])
    assert len(report.segments) == 2
    model = nn.parallel.DistributedDataParallel(net, **options)
    assert 0 < relative(gradients(model, net, x), exact) < 0.02
