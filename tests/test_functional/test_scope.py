"""Scopes in which functions of torch are compressed."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from support.layers import assert_same_bits, relative_error, saved_tensors
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from mmactnn import (
    QReLU,
    convert_model,
    measure_activations,
    register_function,
    revert_model,
)
from mmactnn.functional import ScopedModule, settings_of
from mmactnn.modules.function_mode import active_mode
from mmactnn.registry import Registry, default_registry


class Net(nn.Module):
    """A module that calls functions, beside layers."""

    def __init__(self, width=16):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.act = nn.ReLU()
        self.modes = []

    def forward(self, x):
        self.modes.append(active_mode())
        return F.relu(self.fc(x) + self.act(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Net()
        self.second = Net()

    def forward(self, x):
        return F.leaky_relu(self.second(self.first(x)))


def make_input(*size):
    torch.manual_seed(0)
    return torch.randn(*(size or (64, 16)), requires_grad=True)


def masks(module, x):
    """Number of the graph's nodes that keep masks."""
    # Its nodes live as long as it does.
    output = module(x)
    found, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return sum(node.name() == '_RectifierBackward' for node in found)


def exact_bytes(module, x):
    own = {p.data_ptr() for p in module.parameters()}
    with saved_tensors() as saved:
        module(x)
    return sum(
        {
            t.data_ptr(): t.nbytes for t in saved if t.data_ptr() not in own
        }.values()
    )


class TestEntry:
    def test_functions_of_modules(self):
        net = Net()
        convert_model(net, 'L2')
        assert masks(net, make_input()) == 2
        assert net.modes[-1] is not None and active_mode() is None

    def test_class_is_restored(self):
        net = Outer()
        convert_model(net, 'L2')
        assert (
            type(net) is ScopedModule.of(Outer)
            and type(net).__name__ == 'Outer'
        )
        convert_model(net, 'L3')
        assert type(net) is ScopedModule.of(Outer)
        revert_model(net)
        assert type(net) is Outer and type(net.first) is Net
        assert '_functions' not in vars(net)

    def test_exact_level_changes_nothing(self):
        net = Net()
        convert_model(net, 'L2')
        convert_model(net, 'L0')
        assert masks(net, make_input()) == 0 and net.modes[-1] is None
        net = Net()
        convert_model(net, 'L0')
        assert type(net) is Net

    def test_model_without_layers(self):
        class Plain(nn.Module):
            def forward(self, x):
                return F.relu(x)

        model = Plain()
        convert_model(model, 'L2')
        assert type(model) is Plain

    @pytest.mark.parametrize('how', ['eval', 'no_grad', 'inference'])
    def test_without_training(self, how):
        net = Net()
        twin = copy.deepcopy(net)
        convert_model(net, 'L2')
        x = make_input()
        if how == 'eval':
            net.eval()
            assert masks(net, x) == 0
            assert net.modes[-1] is None
            assert_same_bits(net(x), twin(x))
        with torch.inference_mode(how == 'inference'), torch.no_grad():
            assert_same_bits(net(x), twin(x))

    def test_exception(self):
        net = Net()
        convert_model(net, 'L2')
        with pytest.raises(RuntimeError, match='shapes'):
            net(torch.randn(4, 3, requires_grad=True))
        assert active_mode() is None

    def test_part_in_eval_mode(self):
        net = Outer()
        convert_model(net, 'L2')
        net.first.eval()
        # Those of the second part, and the outer one's.
        assert masks(net, make_input()) == 3
        assert net.first.modes[-1] is None

    def test_replaced_forward(self):
        net = Net()
        net.forward = lambda x: F.relu(net.fc(x))
        convert_model(net, 'L2')
        assert type(net) is Net and masks(net, make_input()) == 0

    def test_two_models(self):
        """Functions have the bits of the innermost model."""
        net = Outer()
        convert_model(net, 'L2')
        convert_model(net.first, 'L0')
        assert masks(net, make_input()) == 3
        convert_model(net, 'L0')
        convert_model(net.first, 'L2')
        assert masks(net, make_input()) == 2

    def test_functional_torch_module(self):
        """Torch's modules with parts call functions, too."""
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        convert_model(layer, 'L2')
        assert masks(layer, make_input(8, 2, 16)) == 1

    def test_subclass_that_computes_otherwise(self):
        class Rectified(nn.Linear):
            def forward(self, x):
                return F.relu(F.linear(x, self.weight, self.bias))

        model = nn.Sequential(Rectified(16, 16), nn.Linear(16, 16))
        stock = copy.deepcopy(model)
        convert_model(model, 'L2')
        x = make_input()
        assert masks(model, x) == 1
        assert exact_bytes(model, x) < exact_bytes(stock, x) / 4
        report = str(convert_model(model, 'L2'))
        assert 'otherwise (0), but for functions that they call' in report


class TestFilters:
    @pytest.mark.parametrize(
        'kwargs',
        [
            dict(exclude=['act', 'relu']),
            dict(exclude=['ReLU']),
            dict(include=['fc']),
            dict(include=[nn.Linear]),
            dict(filter_fn=lambda module, name: 'fc' in name),
        ],
    )
    def test_excluded(self, kwargs):
        net = Net()
        convert_model(net, 'L2', **kwargs)
        assert masks(net, make_input()) == 0

    def test_layer_left_exact(self):
        """Functions of a layer that a filter excludes stay exact."""
        net = Net()
        convert_model(net, 'L2', exclude=['act'])
        assert type(net.act) is nn.ReLU
        assert masks(net, make_input()) == 1

    def test_part(self):
        net = Outer()
        convert_model(net, 'L2', exclude=['first.*'])
        assert masks(net, make_input()) == 3

    def test_rule(self):
        net = Outer()
        convert_model(net, dict(base='L2', rules={'first.*': None}))
        assert masks(net, make_input()) == 3


class TestOthers:
    """Foreign modes, hooks, transforms and copies."""

    def test_foreign_mode_wins(self):
        class Doubled(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                return 2 * result if func is F.relu else result

        net = Net()
        twin = copy.deepcopy(net)
        convert_model(net, 'L2')
        x = make_input()
        with Doubled():
            ours, stock = net(x), twin(x)
        assert_same_bits(ours, stock)
        assert net.modes[-1] is None

    def test_device_context(self):
        net = Net()
        convert_model(net, 'L2')
        with torch.device('cpu'):
            assert masks(net, make_input()) == 2

    def test_patched_function(self, monkeypatch):
        original = F.relu
        net = Outer()
        net.second = net.first.act = nn.Identity()
        twin = copy.deepcopy(net)
        convert_model(net, 'L2')
        monkeypatch.setattr(F, 'relu', lambda x, **kw: original(x, **kw) + 1)
        x = make_input()
        assert_same_bits(net(x), twin(x))

    def test_tensor_subclass(self):
        class Named(torch.Tensor):
            pass

        class Calls(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                return F.relu(x)

        net = Calls()
        convert_model(net, 'L2')
        x = torch.randn(3, 4).as_subclass(Named).requires_grad_()
        output = net(x)
        assert type(output) is Named
        assert masks(net, x) == 0 and masks(net, x.as_subclass(torch.Tensor))

    def test_transforms(self):
        net = Net()
        twin = copy.deepcopy(net)
        convert_model(net, 'L2')
        x = torch.randn(4, 16)
        for ours, stock in zip(
            torch.func.vjp(net, x)[1](torch.ones(4, 16)),
            torch.func.vjp(twin, x)[1](torch.ones(4, 16)),
        ):
            torch.testing.assert_close(ours, stock)
        ours, stock = (torch.func.jvp(m, (x,), (x,))[1] for m in (net, twin))
        torch.testing.assert_close(ours, stock)

    def test_tracers(self):
        net = Net()
        twin = copy.deepcopy(net)
        convert_model(net, 'L2')
        x = make_input()
        graph = torch.fx.symbolic_trace(net)
        assert_same_bits(graph(x), twin(x))
        net.eval()
        program = torch.export.export(net, (x.detach(),))
        torch.testing.assert_close(program.module()(x.detach()), twin(x))

    def test_compiled_part(self):
        """A part that is compiled within a scope is one graph."""
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        class Compiled(nn.Module):
            def forward(self, x):
                return F.relu(2 * x)

        net = Net()
        net.act = Compiled()
        twin = copy.deepcopy(net)
        convert_model(net, 'L2')
        net.act.compile(backend=backend)
        x = make_input()
        for _ in range(2):
            assert_same_bits(net(x), twin(x))
        assert len(graphs) == 1

    @pytest.mark.parametrize('reentrant', [False, True])
    def test_checkpointed_closure(self, reentrant):
        """Code that runs again without its module is exact both times."""

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Net()
                self.fc = nn.Linear(16, 16)

            def forward(self, x):
                def inner(x):
                    x = F.dropout(F.relu(self.fc(x)), 0.5, self.training)
                    return self.part(x)

                return checkpoint(inner, x, use_reentrant=reentrant)

        block = Block()
        twin = copy.deepcopy(block)
        convert_model(block, dict(base='L2', conv=8))
        found = []
        for module in (block, twin):
            x = make_input()
            torch.manual_seed(0)
            output = module(x)
            output.square().sum().backward()
            found.append((output, x.grad, module.fc.weight.grad))
        assert_same_bits(found[0][0], found[1][0])
        for a, b in zip(*found):
            assert relative_error(a, b) < 0.01

    @pytest.mark.parametrize('reentrant', [False, True])
    def test_checkpointed_module_with_dropout(self, reentrant):
        """A mask is the same in both forward passes."""

        class Drops(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(16, 16)

            def forward(self, x):
                return F.dropout(x, 0.5, self.training)

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.drops = Drops()

            def forward(self, x):
                return checkpoint(self.drops, x, use_reentrant=reentrant)

        block = Block()
        convert_model(block, 'L2')
        x = make_input()
        output = block(x)
        output.sum().backward()
        assert_same_bits(x.grad == 0, output == 0)
        assert 0.3 < float((output == 0).float().mean()) < 0.7

    @pytest.mark.parametrize(
        'twin', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    )
    def test_copies(self, twin):
        net = Outer()
        convert_model(net, 'L2')
        x = make_input()
        net(x)
        for module in net.modules():
            module.__dict__.pop('modes', None) and setattr(module, 'modes', [])
        other = twin(net)
        assert type(other) is type(net)
        assert settings_of(other) is not settings_of(net)
        assert settings_of(other).cache is other.first.fc.quantizer.cache
        assert masks(other, x) == 5
        revert_model(other)
        assert masks(net, x) == 5

    def test_threads(self):
        net = Net()
        convert_model(net, 'L2')
        found = {}

        def work(i):
            found[i] = masks(net, make_input()), active_mode()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(3), (2, None))

    def test_meter(self):
        net = Net()
        stock = copy.deepcopy(net)
        convert_model(net, 'L2')
        x = make_input()
        with measure_activations(net) as meter:
            net(x)
        assert meter.exact_bytes == exact_bytes(stock, x)
        assert meter.saved_bytes == exact_bytes(net, x)
        places = {place for place, _ in meter.by_place()}
        assert places == {None}
        assert settings_of(net).make_meter is None

    def test_report(self):
        report = convert_model(Outer(), 'L2')
        assert [item.name for item in report.scoped] == ['', 'first', 'second']
        assert '3 modules: functions that they call' in str(report)


class TestRegistration:
    def test_errors(self):
        with pytest.raises(TypeError, match='registered class'):
            register_function(F.celu, layer=nn.Linear)(lambda *args: None)
        with pytest.raises(ValueError, match='has a handler already'):

            @register_function(F.relu, layer=QReLU)
            def another(quantizer, input):
                pass

        with pytest.raises(ValueError, match="'relu' is registered"):

            @register_function(F.celu, layer=QReLU)
            def relu(quantizer, input):
                pass

        with pytest.raises(TypeError, match='must be callable'):
            register_function('relu', layer=QReLU)(lambda *args: None)
        with pytest.raises(TypeError, match='no function'):
            register_function(layer=QReLU)(lambda *args: None)
        assert F.celu not in default_registry.functions

    def test_registries_are_apart(self):
        assert Registry().functions == {}
