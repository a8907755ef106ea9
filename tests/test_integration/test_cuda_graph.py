"""Training steps in CUDA graphs, and what does not go into one."""

import copy

import pytest
import torch
from support.blocks import make_block
from support.cuda_graph import capture, pretend_capture, warm_up
from support.lagging_transport import LaggingTransport
from support.layers import FLOAT32_ERROR, exact_numerics, relative_error
from torch import nn
from torch.nn import functional as F

from mmactnn import QConv2d, QDropout, convert_model, get_precision
from mmactnn.codes.cache import PayloadCache
from mmactnn.offload import HostSwap

# As L3 for fused blocks, without bits that depend on earlier passes.
FIXED = dict(base='L2', conv=2, norm=2, rectified=3)
# The samples share bits.
ADAPTIVE = dict(base='L3', conv=2.5, norm=2.5)
LEVELS = pytest.mark.parametrize('level', [FIXED, ADAPTIVE], ids=['2', '2.5'])


def make_net(level=None, p=0.0):
    """A stem and a residual block that are fused, dropout, a classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        make_block('torchvision basic'),
        nn.Dropout(p),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 4),
    )
    if level is not None:
        convert_model(net, level)
    return net


def make_batch(device):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    scale = torch.logspace(-0.3, 0.3, 8).view(-1, 1, 1, 1)
    labels = torch.arange(8) % 4
    return (images * scale).to(device), labels.to(device)


def loss_of(net, batch):
    images, labels = batch
    return F.cross_entropy(net(images), labels)


def gradients(net, batch):
    """A step without its last part; gradients are made anew."""
    net.zero_grad(set_to_none=True)
    output = net(batch[0])
    F.cross_entropy(output, batch[1]).backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    return dict(output=output.detach(), **grads)


def assert_unbiased(draw, expected, draws=64):
    """The error of a mean of draws falls as one over their number.

    What is left of the second order in the normalisations may add to it.
    """
    keys = [key for key in expected if key != 'output']

    def error(found):
        return sum(
            (found[key].double() - expected[key].double()).square().sum()
            for key in keys
        )

    found = []
    for _ in range(draws):
        found.append({key: value.clone() for key, value in draw().items()})
    single = sum(map(error, found)) / draws
    mean = {k: sum(f[k].double() for f in found) / draws for k in keys}
    assert 0 < error(mean) < 3 * single / draws


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
class TestReplays:
    DEVICE = torch.device('cuda')

    @pytest.fixture(autouse=True)
    def _exact_numerics(self):
        with exact_numerics():
            yield

    @LEVELS
    def test_gradients(self, level):
        batch = make_batch(self.DEVICE)
        expected = gradients(make_net().to(self.DEVICE), batch)
        net = make_net(level).to(self.DEVICE)
        warm_up(lambda: gradients(net, batch))
        replay, found = capture(lambda: gradients(net, batch))
        draws = []
        for _ in range(2):
            replay()
            error = relative_error(found['output'], expected['output'])
            assert error < FLOAT32_ERROR
            draws.append({key: grad.clone() for key, grad in found.items()})
        # Each convolution reads codes that were rounded anew.
        for key in ('0.weight', '3.conv1.weight', '3.conv2.weight'):
            assert not torch.equal(draws[0][key], draws[1][key])

        def draw():
            replay()
            return found

        assert_unbiased(draw, expected)

    @LEVELS
    def test_training(self, level):
        net = make_net(level, p=0.1).to(self.DEVICE)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        batch = make_batch(self.DEVICE)

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(net, batch)
            loss.backward()
            optimizer.step()
            return loss

        warm_up(step)
        replay, loss = capture(step)
        losses = []
        for _ in range(40):
            replay()
            losses.append(loss.detach().clone())
        losses = torch.stack(losses)
        assert losses.isfinite().all()
        assert losses[-5:].mean() < 0.5 * losses[:5].mean()
        # Warm-up and replays; a capture computes nothing.
        assert int(net[1].num_batches_tracked) == 43
        # The model goes on without a graph.
        assert step().isfinite()

    def test_new_batches_in_the_same_place(self):
        net = make_net(FIXED).to(self.DEVICE)
        plain = make_net().to(self.DEVICE)
        images, labels = make_batch(self.DEVICE)
        static = images.clone(), labels.clone()
        warm_up(lambda: gradients(net, static))
        replay, found = capture(lambda: gradients(net, static))
        for shift in range(3):
            batch = images.roll(shift, -1), labels.roll(shift)
            for place, value in zip(static, batch):
                place.copy_(value)
            expected = gradients(plain, batch)
            replay()
            error = relative_error(found['output'], expected['output'])
            assert error < FLOAT32_ERROR
            # From codes of this batch; those of another one err by 1 or more.
            key = '3.conv1.weight'
            assert relative_error(found[key], expected[key]) < 0.7

    @pytest.mark.parametrize('inplace', [False, True])
    def test_dropout(self, inplace):
        layer = QDropout(0.3, inplace=inplace)
        x = torch.ones(1000, device=self.DEVICE, requires_grad=True)

        def step():
            output = layer(x * 1)
            (grad,) = torch.autograd.grad(output.sum(), x)
            return output.detach(), grad

        warm_up(step)
        replay, (output, grad) = capture(step)
        masks = []
        for _ in range(8):
            replay()
            assert torch.equal(output, grad)
            masks.append(output.clone())
        assert len({tuple(mask.tolist()) for mask in masks}) == 8
        dropped = torch.stack(masks).eq(0).double().mean()
        assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / 8000) ** 0.5

    def test_dropout_follows_torchs_seed(self):
        layer = QDropout(0.5)
        x = torch.ones(1000, device=self.DEVICE)
        warm_up(lambda: layer(x))
        replay, output = capture(lambda: layer(x))

        def draw(seed):
            torch.cuda.manual_seed(seed)
            replay()
            return output.clone()

        # On a busy GPU torch's own dropout, too, draws anew in about one of
        # 5000 first replays.
        replay()
        first = draw(1)
        assert torch.equal(draw(1), first)
        assert not torch.equal(draw(2), first)

    def test_make_graphed_callables(self):
        batch = make_batch(self.DEVICE)
        expected = gradients(make_net().to(self.DEVICE), batch)
        net = make_net(ADAPTIVE).to(self.DEVICE)
        sample = torch.randn(8, 16, 16, 16, device=self.DEVICE)
        gradients(net, batch)
        torch.cuda.make_graphed_callables(net[3], (sample.requires_grad_(),))
        assert_unbiased(lambda: gradients(net, batch), expected)

    def test_bits_stay(self):
        net = make_net(ADAPTIVE).to(self.DEVICE)
        batch = make_batch(self.DEVICE)
        precision = get_precision(net)
        first = precision.bits
        warm_up(lambda: gradients(net, batch), times=11)
        bits = precision.bits
        assert bits != first
        replay, found = capture(lambda: gradients(net, batch))
        for _ in range(10):
            replay()
        assert all(value.isfinite().all() for value in found.values())
        assert precision.bits == bits
        # Passes go on where they were.
        for _ in range(8):
            gradients(net, batch)
        assert precision.state_dict()['passes'] == 19

    def test_capture_before_any_step(self):
        layer = QConv2d(3, 4, 3).to(self.DEVICE)
        convert_model(layer, FIXED)
        x = torch.randn(2, 3, 8, 8, device=self.DEVICE)
        with torch.no_grad():
            layer(x)
        with pytest.raises(RuntimeError, match='side stream'):
            capture(lambda: layer(x))
        layer(x).sum().backward()
        assert layer.weight.grad.isfinite().all()

    def test_swapping(self):
        net = make_net('L4').to(self.DEVICE)
        batch = make_batch(self.DEVICE)
        gradients(net, batch)
        with pytest.raises(RuntimeError, match='detach'):
            capture(lambda: net(batch[0]))


class TestRefusals:
    """Decisions of the host cannot be captured."""

    def test_swapping(self, monkeypatch):
        net = make_net()
        HostSwap(net, transport=LaggingTransport).attach()
        loss_of(net, make_batch('cpu')).backward()
        pretend_capture(monkeypatch)
        with pytest.raises(RuntimeError, match='swapping to the host'):
            loss_of(net, make_batch('cpu'))
        # A model that keeps nothing swaps nothing.
        with torch.no_grad():
            net(make_batch('cpu')[0])

    def test_gradients_of_samples(self, monkeypatch):
        level = dict(base='L3', use_gradient=True)
        net = make_net()
        convert_model(net, level, num_samples=20)
        precision = get_precision(net)
        batch = make_batch('cpu')
        precision.set_samples(range(8))
        gradients(net, batch)
        pretend_capture(monkeypatch)
        # Nothing is left of the earlier pass: ranges decide.
        gradients(net, batch)
        precision.set_samples(range(8))
        with pytest.raises(RuntimeError, match='samples'):
            net(batch[0])

    def test_reports(self, monkeypatch):
        net = make_net('L3')
        precision = get_precision(net)
        batch = make_batch('cpu')
        gradients(net, batch)
        assert any(layer.report is not None for layer in precision.layers)
        before = copy.deepcopy(precision.state_dict())
        with monkeypatch.context() as patch:
            pretend_capture(patch)
            with pytest.raises(RuntimeError, match='end_pass'):
                precision.end_pass()
            gradients(net, batch)
        # The graph's pass was none.
        assert precision.state_dict() == before
        precision.end_pass()
        assert len(precision.state_dict()['pending']) == 1

    @pytest.mark.skipif(
        not torch.cuda.is_available(), reason='no GPU is available'
    )
    def test_payloads_of_what_comes_from_outside(self, monkeypatch):
        x = torch.ones(2, 3, requires_grad=True, device='cuda') * 2
        cache, payload = PayloadCache(), object()
        cache.put(x, payload)
        assert cache.get(x) is payload
        with monkeypatch.context() as patch:
            pretend_capture(patch)
            assert cache.get(x) is None
            cache.put(x, payload)
            assert cache.get(x) is payload
        assert cache.get(x) is None
