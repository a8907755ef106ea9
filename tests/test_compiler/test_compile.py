"""Compiled graphs that keep codes: gradients, memory and options."""

import pytest
import torch
import torch.nn.functional as F
from support.transformer import Block, relative
from torch import nn

import mmactnn


class Mlp(nn.Sequential):
    """A rectifier, a gate-like activation and a layer of either."""

    def __init__(self):
        super().__init__(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.SiLU()
        )


class Cnn(nn.Module):
    """Residual block behind a stem with pooling."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Windows(nn.Module):
    """Attention within shifted windows, by separate calls."""

    def __init__(self, width=64, heads=4, window=16):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, window, window))

    def forward(self, x):
        n, t, c = x.shape
        y = torch.roll(self.norm(x), 3, 1).view(-1, self.window, c)
        y = self.qkv(y).view(len(y), self.window, 3, self.heads, -1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + self.bias
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c)
        return x + torch.roll(self.proj(y), -3, 1)


def make(name):
    """Model and input, the same in every call."""
    torch.manual_seed(0)
    mmactnn.manual_seed(0)
    if name == 'mlp':
        return Mlp(), torch.randn(256, 64)
    if name == 'cnn':
        return Cnn(), torch.randn(8, 3, 32, 32)
    if name == 'vit':
        return Block(), torch.randn(4, 64, 64)
    return Windows(), torch.randn(4, 64, 64)


def gradient(model, function, *inputs):
    """Loss and gradient of all parameters."""
    model.zero_grad()
    loss = function(*inputs).float().square().mean()
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters()]
    return loss.detach(), torch.cat(grads).clone()


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Least factor of memory, and largest error of one draw.
@pytest.mark.parametrize(
    'name, ratio, error',
    [
        pytest.param('mlp', 9, 0.1, marks=pytest.mark.full),
        ('cnn', 8, 0.05),
        ('vit', 9, 0.35),
        pytest.param('win', 7, 0.5, marks=pytest.mark.full),
    ],
)
def test_gradients_are_unbiased(name, ratio, error):
    """The loss is exact; the mean of draws tends to the gradient."""
    model, x = make(name)
    exact = torch.compile(model, backend='aot_eager_decomp_partition')
    loss, expected = gradient(model, exact, x)
    compiled = mmactnn.compile(model, backend='aot_eager')
    draws = []
    for _ in range(16):
        found, grad = gradient(model, compiled, x)
        assert found == loss
        draws.append(grad)
    single = sum(relative(grad, expected) for grad in draws) / len(draws)
    assert 0.002 < single < error
    assert len({float(grad.sum()) for grad in draws}) == len(draws)
    mean = relative(sum(draws) / len(draws), expected)
    assert mean * len(draws) ** 0.5 < 1.3 * single
    kept = mmactnn.compile_report(compiled).graphs[0].kept
    before = sum(item.exact_nbytes for item in kept)
    assert before > ratio * sum(item.nbytes for item in kept)


def exact_and_coded(model, **kwargs):
    """Compiled exactly, and with codes, by torch's kernels."""
    exact = torch.compile(
        model, backend='aot_eager_decomp_partition', **kwargs
    )
    return exact, mmactnn.compile(model, backend='aot_eager', **kwargs)


def mean_of_draws(model, function, count, *inputs):
    draws = [gradient(model, function, *inputs)[1] for _ in range(count)]
    return sum(draws) / count


@pytest.mark.full
def test_dynamic_shapes():
    """One graph serves several sizes, odd ones included."""
    model, _ = make('vit')
    exact, coded = exact_and_coded(model, dynamic=True)
    for shape in ((4, 48, 64), (3, 77, 64)):
        x = torch.randn(shape)
        loss, expected = gradient(model, exact, x)
        found, grad = gradient(model, coded, x)
        assert found == loss
        assert 0.002 < relative(grad, expected) < 0.6
    assert len(mmactnn.compile_report(coded).graphs) == 1


class Broken(nn.Module):
    """Two blocks around a graph break, and a part that may be repeated."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.first, self.second = Block(dropout=0.1), Block(dropout=0.1)
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            run = torch.utils.checkpoint.checkpoint
            return self.second(run(self.first, x, use_reentrant=False))
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize(
    'checkpointed', [pytest.param(False, marks=pytest.mark.full), True]
)
def test_parts_and_dropout(checkpointed):
    """Graph breaks, checkpointing inside, masks of dropout."""
    make('vit')
    model, x = Broken(checkpointed), torch.randn(4, 64, 64)
    exact, coded = exact_and_coded(model)
    torch.manual_seed(1)
    loss, expected = gradient(model, exact, x)
    draws = []
    for _ in range(5):
        torch.manual_seed(1)
        found, grad = gradient(model, coded, x)
        assert found == loss
        draws.append(grad)
    single = relative(draws[0], expected)
    assert relative(sum(draws) / 5, expected) < 0.6 * single < 0.3
    graphs = mmactnn.compile_report(coded).graphs
    assert len(graphs) == 2 - checkpointed


@pytest.mark.full
def test_autocast_and_accumulation():
    model, x = make('vit')
    exact, coded = exact_and_coded(model)
    with torch.autocast('cpu', torch.bfloat16):
        loss, expected = gradient(model, exact, x)
        found, once = gradient(model, coded, x)
        assert found == loss
        for _ in range(7):
            coded(x).float().square().mean().backward()
    total = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert relative(total / 8, expected) < 0.55 * relative(once, expected)


def test_rounding_repeats_with_the_seed():
    model, x = make('mlp')
    coded = mmactnn.compile(model, backend='aot_eager')
    grads = []
    for seed in (5, 5, 6):
        mmactnn.manual_seed(seed)
        grads.append(gradient(model, coded, x)[1])
    mmactnn.manual_seed(None)
    assert grads[0].equal(grads[1])
    assert not grads[0].equal(grads[2])


def test_exact_level_is_the_compiler():
    model, x = make('mlp')
    exact = torch.compile(model, backend='aot_eager_decomp_partition')
    coded = mmactnn.compile(model, 'L0', backend='aot_eager')
    for a, b in zip(gradient(model, exact, x), gradient(model, coded, x)):
        assert a.equal(b)
    assert mmactnn.compile_options('L0') == dict(backend='inductor')
    with pytest.raises(ValueError, match='keeps codes'):
        mmactnn.compile_report(coded)


def test_inductor():
    """The same by generated code, whose cache has a key for the pass."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(64, 64)
    loss, expected = gradient(model, model, x)
    coded = mmactnn.compile(model)
    found, first = gradient(model, coded, x)
    torch.testing.assert_close(found, loss)
    mean = (first + 7 * mean_of_draws(model, coded, 7, x)) / 8
    assert relative(mean, expected) < 0.6 * relative(first, expected) < 0.3
    settings = mmactnn.compile_options('L3', mode='max-autotune-no-cudagraphs')
    assert settings['options']['max_autotune']
    keys = {
        mmactnn.compile_options(level)['options'][
            'custom_partitioner_fn'
        ].uuid()
        for level in ('L1', 'L2', 'L3', 'L3')
    }
    assert len(keys) == 3


def test_bad_input():
    model, _ = make('mlp')
    with pytest.raises(ValueError, match="'inductor', 'aot_eager'.*'eager'"):
        mmactnn.compile(model, backend='eager')
    with pytest.raises(ValueError, match='swaps to the host'):
        mmactnn.compile(model, 'L4')
    with pytest.raises(ValueError, match='rules by name'):
        mmactnn.compile(model, dict(rules={'*': 4}))
    with pytest.raises(ValueError, match="Inductor's"):
        mmactnn.compile(model, backend='aot_eager', mode='max-autotune')
    with pytest.raises(TypeError, match='got int'):
        mmactnn.compile(3)
    mmactnn.convert_model(model)
    with pytest.raises(ValueError, match="first: '0', QLinear.*revert_model"):
        mmactnn.compile(model)


def test_torch_without_the_hook(monkeypatch):
    from torch._functorch import partitioners

    model, _ = make('mlp')
    monkeypatch.delattr(partitioners, 'raise_getitems')
    with pytest.raises(RuntimeError, match='raise_getitems, which torch'):
        mmactnn.compile(model, backend='aot_eager')


def test_registered_use():
    """An unknown operation gets exact values until it is declared linear."""
    library = torch.library.Library('mmactnn_test', 'DEF')
    library.define('scale(Tensor x, Tensor y) -> Tensor')
    library.impl('scale', lambda x, y: x * y, 'CompositeExplicitAutograd')
    torch.library.register_fake(
        'mmactnn_test::scale', lambda x, y: torch.empty_like(x), lib=library
    )
    op = torch.ops.mmactnn_test.scale

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return op(x, y)

        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            return op(grad, y), op(grad, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

        def forward(self, x):
            return Scale.apply(*(layer(x) for layer in self.layers))

    kinds = []
    for _ in range(2):
        torch._dynamo.reset()
        model, x = Model(), torch.randn(64, 64)
        coded = mmactnn.compile(model, backend='aot_eager')
        gradient(model, coded, x)
        kept = mmactnn.compile_report(coded).graphs[0].kept
        kinds.append([item.kind for item in kept if item.exact_nbytes > 9999])
        mmactnn.register_linear_use(op, 1)
    assert sorted(kinds[0]) == ['codes', 'exact', 'exact']
    assert kinds[1] == ['codes'] * 3
    with pytest.raises(ValueError, match='position of a tensor'):
        mmactnn.register_linear_use(op, 2)
    with pytest.raises(TypeError, match='must be an operation'):
        mmactnn.register_linear_use('scale', 0)


def test_saved_tensors_are_the_report():
    """Tensors that autograd holds are those of the report."""
    model, x = make('vit')
    coded = mmactnn.compile(model, backend='aot_eager')
    gradient(model, coded, x)
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = coded(x)
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    total = sum(held[key] for key in held.keys() - known)
    report = mmactnn.compile_report(coded)
    assert total == report.nbytes
    y.sum().backward()
    assert sum(report.by_module().values()) == total
    text = str(report)
    assert 'codes of 4 bits (attention)' in text
    assert '(linear_ops, norm)  norm1' in text
