"""Parts of a model as graphs: when they are captured and replayed."""

import copy
import pickle

import pytest
import torch
from support.blocks import make_block
from support.host_recorder import HostRecorder
from torch import nn

from mmactnn import (
    ActivationMeter,
    convert_model,
    get_precision,
    measure_activations,
)
from mmactnn.graphs import remove_cuda_graphs, use_cuda_graphs
from mmactnn.graphs.part import GraphedPart


def make_net(level='L0'):
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        make_block('torchvision basic'),
    )
    net = nn.Sequential(features, nn.Flatten(), nn.Linear(16 * 64, 4))
    convert_model(net, level)
    return net


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def extract_feat(self, x, scale=1):
        return {'x': (scale * self.backbone(x),), 'n': 2}

    def forward(self, x):
        return self.head(self.extract_feat(x, scale=3)['x'][0])


def use_graphs(net, parts=('0',), **kwargs):
    """As on a GPU."""
    graphed = use_cuda_graphs(net, parts, **kwargs)
    for part in graphed.values():
        part._make_recorder = HostRecorder
        part._device_type = 'cpu'
    return graphed[parts[0]]


def make_batch(seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator)


def step(net, seed=0, size=4):
    net.zero_grad()
    loss = net(make_batch(seed, size)).square().mean()
    loss.backward()
    return loss.item()


def gradients(net):
    return [p.grad for p in net.parameters()]


class TestReplays:
    def test_results(self):
        plain, net = make_net(), make_net()
        part = use_graphs(net)
        for seed in range(6):
            assert step(net, seed) == step(plain, seed)
            for found, expected in zip(gradients(net), gradients(plain)):
                assert torch.equal(found, expected)
        assert part.stats[:3] == (1, 3, 3)

    def test_kinds_of_calls(self):
        net = make_net()
        part = use_graphs(net, max_graphs=2, warmup=1)
        for _ in range(3):
            for size in (2, 3, 4):
                step(net, size=size)
        assert part.stats.graphs == 2
        # Each kind once, and the third one always.
        assert part.stats.eager == 2 + 3
        with torch.autocast('cpu', torch.bfloat16):
            step(net, size=2)
        assert part.stats.eager == 2 + 3 + 1

    def test_evaluation_is_left_alone(self):
        net = make_net()
        part = use_graphs(net, warmup=1)
        net.eval()
        step(net)
        net.train()
        with torch.no_grad():
            net(make_batch())
        assert part.stats[:3] == (0, 0, 0)

    def test_a_waiting_call_keeps_its_memory(self):
        plain, net = make_net(), make_net()
        part = use_graphs(net, warmup=1)
        step(net), step(plain)
        for model in (net, plain):
            model.zero_grad()
            first, second = model(make_batch(1)), model(make_batch(2))
            (first + 2 * second).square().mean().backward()
        for found, expected in zip(gradients(net), gradients(plain)):
            torch.testing.assert_close(found, expected)
        assert part.stats[1:3] == (1, 2)

    def test_a_call_without_backward_pass_waits_no_longer(self):
        net = make_net()
        part = use_graphs(net, warmup=1)
        step(net)
        net(make_batch())
        step(net)
        assert part.stats[1:3] == (2, 1)

    def test_second_backward_pass(self):
        net = make_net()
        use_graphs(net, warmup=1)
        step(net)
        loss = net(make_batch()).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match='backward a second time'):
            loss.backward()

    def test_output_written_in_place(self):
        net = make_net()
        part = use_graphs(net, warmup=1)
        step(net)
        output = part(make_batch())
        output.mul_(2)
        with pytest.raises(RuntimeError, match='written to in place'):
            output.sum().backward()

    def test_gradient_of_the_input(self):
        net = make_net()
        use_graphs(net, warmup=1)
        expected = make_batch().requires_grad_()
        make_net()(expected).square().mean().backward()
        for _ in range(3):
            x = make_batch().requires_grad_()
            net(x).square().mean().backward()
            torch.testing.assert_close(x.grad, expected.grad)


class TestChanges:
    @pytest.mark.parametrize(
        'change',
        [
            lambda net: net[0][2].eval(),
            lambda net: setattr(net[0][1], 'momentum', 0.5),
            lambda net: net[0][0].requires_grad_(False),
            lambda net: setattr(
                net[0][0], 'weight', nn.Parameter(2 * net[0][0].weight)
            ),
            lambda net: net[0].append(nn.Tanh()),
            lambda net: convert_model(net, 'L0'),
        ],
        ids=['eval', 'momentum', 'frozen', 'weight', 'layer', 'converted'],
    )
    def test_graphs_are_made_anew(self, change):
        plain, net = make_net(), make_net()
        part = use_graphs(net, warmup=2)
        for _ in range(3):
            step(net), step(plain)
        for model in (net, plain):
            change(model)
        eager = part.stats.eager
        for seed in range(3):
            assert step(net, seed) == step(plain, seed)
        # The host runs a call before it is captured.
        assert part.stats.eager == eager + 1

    def test_constant_change_is_an_error(self):
        net = make_net()
        use_graphs(net, warmup=1)
        with pytest.raises(RuntimeError, match=r'0 .* lately in 1\.momentum'):
            for i in range(40):
                net[0][1].momentum = 0.1 + i / 1000
                step(net)

    def test_attribute_of_the_forward_pass(self):
        class Counts(nn.Linear):
            def forward(self, x):
                self.calls = x.sum()
                return super().forward(x)

        net = nn.Sequential(nn.Sequential(Counts(4, 4)))
        use_graphs(net)
        with pytest.raises(RuntimeError, match=r'sets the attribute 0\.calls'):
            for _ in range(4):
                net(torch.ones(2, 4)).sum().backward()

    @pytest.mark.parametrize('name', ['0', '0.0'])
    def test_hooks(self, name):
        net = make_net()
        use_graphs(net, warmup=1)
        step(net)
        step(net)
        hooked = net.get_submodule(name)
        hooked.register_forward_hook(lambda *args: None)
        step(net)
        with pytest.raises(RuntimeError, match=' has hooks'):
            step(net)

    def test_adaptive_bits(self):
        net = make_net(dict(base='L3', conv=2.5, norm=2.5))
        part = use_graphs(net)
        precision = get_precision(net)
        for seed in range(12):
            step(net, seed)
        # Passes 1, 2, 4 and 8 report.
        assert precision.state_dict()['passes'] == 12
        assert part.stats.replays > 3
        plain = make_net(dict(base='L3', conv=2.5, norm=2.5))
        for seed in range(12):
            step(plain, seed)
        reports = precision.state_dict()['averages']
        expected = get_precision(plain).state_dict()['averages']
        assert reports.keys() == expected.keys()
        for key, values in expected.items():
            torch.testing.assert_close(
                torch.tensor(reports[key]),
                torch.tensor(values),
                rtol=1.0,
                atol=1e-3,
            )


class TestModels:
    def test_measured_as_without_graphs(self):
        # What replays add to a meter; here they also run the layers.
        net = make_net('L2')
        part = use_graphs(net, warmup=1)
        with measure_activations(net) as expected:
            net[0](make_batch()).sum().backward()
        net[0](make_batch()).sum().backward()
        (kind,) = part._seen[False].values()
        meter = ActivationMeter(net)
        meter.add(kind.amounts, kind.captured.results)
        for name in (
            'saved_bytes',
            'exact_bytes',
            'layers_saved_bytes',
            'layers_exact_bytes',
        ):
            assert getattr(meter, name) == getattr(expected, name) > 0, name
        # A layer behind the part that keeps its output, keeps it once.
        saved = meter.exact_bytes
        meter.replace((), (kind.captured.results[0].view(-1),))
        assert meter.exact_bytes == saved

    def test_methods(self):
        net = Model()
        expected = net(torch.ones(2, 4))
        part = use_graphs(net, ('extract_feat',), warmup=1)
        for _ in range(3):
            found = net(torch.ones(2, 4))
            assert torch.equal(found, expected)
            found.sum().backward()
        assert part.stats[1:3] == (2, 1)
        remove_cuda_graphs(net)
        assert 'extract_feat' not in vars(net)

    def test_copies_and_pickles(self):
        net = make_net()
        use_graphs(net, warmup=1)
        step(net), step(net)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            # As torch does with compiled modules.
            assert other[0]._compiled_call_impl is None
            assert step(other) == step(net)

    def test_copies_of_methods(self):
        net = Model()
        use_graphs(net, ('extract_feat',), warmup=1)
        for _ in range(2):
            net(torch.ones(2, 4)).sum().backward()
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            own = vars(other)['extract_feat']
            assert isinstance(own, GraphedPart)
            assert own._module is other
            assert own.stats[:3] == (0, 0, 0)
            assert torch.equal(other(torch.ones(2, 4)), net(torch.ones(2, 4)))

    def test_checkpointed(self):
        net = make_net()
        part = use_graphs(net, warmup=1)
        step(net), step(net)
        expected = gradients(net)
        net.zero_grad()
        y = torch.utils.checkpoint.checkpoint(
            net, make_batch(), use_reentrant=False
        )
        y.square().mean().backward()
        assert part.stats.replays == 1
        for found, other in zip(gradients(net), expected):
            torch.testing.assert_close(found, other)

    def test_what_cannot_be_captured(self, monkeypatch):
        net = make_net()
        use_graphs(net, warmup=1)
        monkeypatch.setattr(HostRecorder, 'broken', True)
        step(net)
        with pytest.raises(RuntimeError, match='0 cannot be captured'):
            step(net)
        # Parameters are as before.
        remove_cuda_graphs(net)
        step(net)

    def test_other_results(self):
        class Named(nn.Linear):
            def forward(self, x):
                return super().forward(x), object()

        net = nn.Sequential(Named(4, 4))
        use_graphs(net, warmup=1)
        net(torch.ones(2, 4))[0].sum().backward()
        with pytest.raises(RuntimeError, match='constants, got object'):
            net(torch.ones(2, 4))


class TestChoice:
    def test_unknown_part(self):
        with pytest.raises(ValueError, match="method 'neck'.* are 0, 1, 2"):
            use_cuda_graphs(make_net(), ['neck'])

    def test_default_needs_features(self):
        with pytest.raises(ValueError, match='extract_feat'):
            use_cuda_graphs(make_net())

    def test_nested_parts(self):
        with pytest.raises(ValueError, match=r"'0\.1' lies within '0'"):
            use_cuda_graphs(make_net(), ['0', '0.1'])

    @pytest.mark.parametrize('parts', ['0', [1]])
    def test_names(self, parts):
        with pytest.raises(TypeError, match='list of names'):
            use_cuda_graphs(make_net(), parts)

    def test_counts(self):
        with pytest.raises(ValueError, match='max_graphs'):
            use_cuda_graphs(make_net(), ['0'], max_graphs=0)

    def test_swapped(self):
        with pytest.raises(RuntimeError, match='level without swap'):
            use_cuda_graphs(make_net('L4'), ['0'])

    def test_gradients_of_samples(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3))
        convert_model(net, dict(base='L3', use_gradient=True), num_samples=4)
        with pytest.raises(RuntimeError, match='without use_gradient'):
            use_cuda_graphs(net, ['0'])
