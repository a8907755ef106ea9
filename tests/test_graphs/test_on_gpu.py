"""Parts of a model as CUDA graphs, on a GPU."""

import copy

import pytest
import torch
from support.blocks import make_block
from support.layers import exact_numerics
from torch import nn

from mmactnn import convert_model, measure_activations
from mmactnn.graphs import use_cuda_graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


def make_net(level, p=0.0):
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        make_block('torchvision basic'),
        nn.Dropout(p),
    )
    net = nn.Sequential(features, nn.Flatten(), nn.Linear(16 * 64, 4)).cuda()
    if level is not None:
        convert_model(net, level)
    return net


def make_batch(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator).cuda()


def train(net, steps, autocast=False, size=4):
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        with torch.autocast('cuda', torch.float16, enabled=autocast):
            loss = net(make_batch(i, size)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('autocast', [False, True])
def test_exact_training_is_the_same(autocast):
    plain, graphed = make_net(None), make_net('L0')
    part = use_cuda_graphs(graphed, ['0'])['0']
    expected = train(plain, 10, autocast)
    assert train(graphed, 10, autocast) == expected
    assert part.stats.replays == 7
    assert part.stats.pool_mib > 0
    for (key, value), other in zip(
        plain.state_dict().items(), graphed.state_dict().values()
    ):
        assert torch.equal(value, other), key


@pytest.mark.parametrize('level', ['L2', 'L3', 'L3S', 'L3R'])
def test_gradients_are_unbiased(level):
    exact, graphed = make_net(None), make_net(level)
    part = use_cuda_graphs(graphed, ['0'])['0']
    x = make_batch(0)
    exact(x).square().mean().backward()
    weight = exact[0][0].weight.grad.double()
    found = []
    for _ in range(80):
        graphed.zero_grad()
        graphed(x).square().mean().backward()
        found.append(graphed[0][0].weight.grad.double())
    assert part.stats.replays > 60
    found = torch.stack(found[-60:])
    single = (found - weight).square().sum((1, 2, 3, 4)).mean()
    mean = (found.mean(0) - weight).square().sum()
    assert mean < 3 * single / len(found) + 1e-6 * weight.square().sum()
    if level != 'L3R':
        assert single > 0


def test_dropout_draws_anew():
    net = make_net('L2', p=0.5)
    use_cuda_graphs(net, ['0'])
    x = make_batch(0)
    outputs = []
    for _ in range(6):
        y = net(x)
        y.sum().backward()
        outputs.append(y.detach().clone())
    assert not any(torch.equal(a, b) for a, b in zip(outputs[3:], outputs[4:]))


def test_gradients_accumulate():
    net, other = make_net(None), make_net(None)
    part = use_cuda_graphs(net, ['0'])['0']
    train(net, 5)
    train(other, 5)
    for model in (net, other):
        for i in range(3):
            model(make_batch(i)).square().mean().backward()
    assert part.stats.replays > 4
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_waiting_calls_do_not_share_memory():
    net = make_net(None)
    other = copy.deepcopy(net)
    part = use_cuda_graphs(net, ['0'])['0']
    for model in (net, other):
        train(model, 4)
        first, second = model(make_batch(0)), model(make_batch(1))
        (first.square().mean() + second.square().mean()).backward()
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    assert part.stats.eager == 4


def test_activations_are_counted():
    net = make_net('L3')
    part = use_cuda_graphs(net, ['0'])['0']
    counts = []
    for _ in range(40):
        with measure_activations(net) as meter:
            net(make_batch(0)).square().mean().backward()
        counts.append((meter.saved_bytes, meter.exact_bytes))
    assert part.stats.replays > 20
    assert len(set(counts)) == 1


def test_a_part_that_waits_for_the_device():
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) * x.sum().item()

    net = nn.Sequential(Waits()).cuda()
    use_cuda_graphs(net, ['0'], warmup=1)
    x = torch.randn(4, 4, device='cuda')
    net(x).sum().backward()
    with pytest.raises(RuntimeError, match='cannot be captured'):
        net(x)
    # The device is as before.
    assert (x + 1).sum().isfinite()
