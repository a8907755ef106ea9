"""Traces of blocks: calls, refused forward passes, and guards."""

import copy
import operator
import random
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmactnn import convert_model, measure_activations, revert_model
from mmactnn.fusion import is_fused
from mmactnn.fusion.trace import UntraceableError, trace_block

SCALE = 2.0
SETTINGS = {'slope': 0.5}


class Block(nn.Module):
    """Convolution, normalisation and ReLU, with attributes to read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.calls, self.seen, self.stats = 0, [], {'calls': 0}
        self.rate, self.skip, self.names = 0.5, False, ['conv', 'norm']

    def body(self, x):
        return self.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return self.body(x)


def make(forward, **attributes):
    """A block of a new class with the given forward pass."""
    torch.manual_seed(0)
    block = type('Own', (Block,), dict(forward=forward))()
    vars(block).update(attributes)
    return block


def counts(self, x):
    self.calls += 1
    return self.body(x)


def appends(self, x):
    self.seen.append(x)
    return self.body(x)


def counts_in_a_dict(self, x):
    self.stats['calls'] += 1
    return self.body(x)


def drops_by_python(self, x):
    return x if random.random() < self.rate else self.body(x)


def drops_by_torch(self, x):
    return x if torch.rand(1).item() < self.rate else self.body(x)


def looks_at_the_clock(self, x):
    return self.body(x) if time.time() > 0 else x


def prints(self, x):
    print('called')
    return self.body(x)


def without_grad(self, x):
    with torch.no_grad():
        x = x + 1
    return self.body(x)


def checkpoints(self, x):
    return checkpoint(self.body, x, use_reentrant=False)


def looks_at_the_shape(self, x):
    return self.body(x) if x.shape[0] > 1 else x


def uses_a_constant(self, x):
    return self.body(x) + torch.ones(4, 1, 1)


def takes_any(self, *args):
    return self.body(args[0])


@pytest.mark.parametrize(
    'forward',
    [
        counts,
        appends,
        counts_in_a_dict,
        drops_by_python,
        drops_by_torch,
        looks_at_the_clock,
        prints,
        without_grad,
        checkpoints,
        looks_at_the_shape,
        uses_a_constant,
        takes_any,
    ],
    ids=lambda forward: forward.__name__,
)
def test_untraceable_forward_passes(forward, capsys):
    block = make(forward).eval()
    before = copy.deepcopy(block)
    with pytest.raises(UntraceableError):
        trace_block(block, type(block))
    assert (block.calls, block.seen, block.stats) == (0, [], {'calls': 0})
    assert not block.training and vars(block).keys() == vars(before).keys()
    assert not capsys.readouterr().out
    report = convert_model(block, 'L3')
    assert [item.name for item in report.unfused] == ['']
    # In training the block's own forward pass runs.
    block.train(), before.train()
    x = torch.randn(2, 4, 6, 6)
    for seeded in (random.seed, torch.manual_seed):
        seeded(0)
    expected = before(x)
    for seeded in (random.seed, torch.manual_seed):
        seeded(0)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert block.calls == before.calls and block.stats == before.stats


def by_global(self, x):
    return self.body(x) * SCALE


def by_dict(self, x):
    return F.leaky_relu(self.body(x), SETTINGS['slope'])


def by_attribute(self, x):
    return x if self.skip else self.body(x)


def by_list(self, x):
    for name in self.names:
        x = getattr(self, name)(x)
    return self.relu(x)


def by_class(self, x):
    return self.body(x)


def change_global(block):
    globals()['SCALE'] = 3.0
    return lambda: globals().update(SCALE=2.0)


def change_dict(block):
    SETTINGS['slope'] = 0.1
    return lambda: SETTINGS.update(slope=0.5)


def change_attribute(block):
    block.skip = True
    return lambda: None


def change_list(block):
    block.names.insert(0, 'conv')
    return lambda: None


def change_method(block):
    original = Block.body
    Block.body = lambda self, x: original(self, x) * 0.5
    return lambda: setattr(Block, 'body', original)


def change_own_method(block):
    block.body = lambda x: x * 0.5
    return lambda: None


def change_function(block):
    original = F.leaky_relu
    F.leaky_relu = lambda x, slope: original(x, slope) + 1
    return lambda: setattr(F, 'leaky_relu', original)


@pytest.mark.parametrize(
    ('forward', 'change'),
    [
        (by_global, change_global),
        (by_dict, change_dict),
        (by_attribute, change_attribute),
        (by_list, change_list),
        (by_class, change_method),
        (by_class, change_own_method),
        (by_dict, change_function),
    ],
    ids=lambda value: value.__name__,
)
def test_guards(forward, change):
    """Changes of values that a trace has read take effect."""
    ours = make(forward)
    stock = copy.deepcopy(ours)
    convert_model(ours, 'L3')
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    undo = change(ours)
    if change in (change_attribute, change_list, change_own_method):
        change(stock)
    try:
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
    finally:
        undo()


def test_in_place_operators():
    def forward(self, x):
        y = self.norm(self.conv(x))
        y += x
        return self.relu(y)

    block = make(forward)
    (trace,) = trace_block(block, type(block))
    assert operator.iadd in [node.target for node in trace.calls]
    report = convert_model(block, 'L3')
    assert report.fused[0].norms == 1
    stock = make(forward)
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    torch.testing.assert_close(block(x), stock(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


def test_sum_in_place_of_the_other_operand():
    def forward(self, x):
        y = x * 1
        y += self.norm(self.conv(x))
        return self.relu(y) + y

    ours, stock = make(forward), make(forward)
    convert_model(ours, 'L3')
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


def test_list_inputs():
    def forward(self, x):
        assert isinstance(x, list)
        return self.body(torch.cat(x, 1))

    ours, stock = make(forward), make(forward)
    report = convert_model(ours, 'L3')
    assert report.fused[0].norms == 1
    x = torch.randn(2, 4, 6, 6)
    inputs = [x[:, :1], x[:, 1:]]
    torch.testing.assert_close(
        ours(inputs), stock(inputs), rtol=1e-4, atol=1e-5
    )
    for module in (ours, stock):
        with pytest.raises(AssertionError):
            module(x)


def test_order_of_random_numbers():
    def forward(self, x):
        y = self.norm(self.conv(self.drop(x)))
        return self.relu(y + self.shortcut(x))

    def make_block():
        block = make(forward)
        block.drop = nn.Dropout(0.5)
        block.shortcut = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        )
        return block

    ours, stock = make_block(), make_block()
    stock.load_state_dict(ours.state_dict())
    convert_model(ours, 'L3', exclude=['*drop*', 'shortcut.0'])
    assert is_fused(ours) and is_fused(ours.shortcut)
    x, outputs = torch.randn(2, 4, 6, 6), []
    for module in (ours, stock):
        torch.manual_seed(1)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_copies_compute_with_their_own_children():
    block = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    convert_model(block, 'L3')
    assert is_fused(block)
    twin = copy.copy(block)
    twin._modules = {k: copy.deepcopy(m) for k, m in block._modules.items()}
    with torch.no_grad():
        twin[0].weight.mul_(3)
    x = torch.randn(2, 4, 6, 6)
    exact = copy.deepcopy(twin)
    revert_model(exact)
    torch.testing.assert_close(twin(x), exact(x), rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    act = nn.SiLU()

    def __init__(self, drop=nn.Dropout(0.5)):  # noqa: B008  (on purpose)
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.relu, self.drop = self.act, drop

    def forward(self, x):
        return self.drop(self.relu(self.conv(x)))


def test_layers_shared_with_other_models():
    inner = nn.ReLU()
    ours, other = nn.Sequential(inner, Shared()), nn.Sequential(inner)
    hook = inner.register_forward_hook(lambda *_: None)
    convert_model(ours, 'L3')
    assert type(other[0]) is nn.ReLU and type(Shared().relu) is nn.SiLU
    assert type(Shared().drop) is nn.Dropout
    assert [type(m).__name__ for m in (ours[0], ours[1].relu)] == [
        'QReLU',
        'QSiLU',
    ]
    # A hook of the layer is a hook of its alias.
    assert len(ours[0]._forward_hooks) == 1
    hook.remove()
    assert not ours[0]._forward_hooks
    with measure_activations(ours) as meter:
        ours(torch.randn(2, 4, 32, 32, requires_grad=True))
    assert meter.ratio > 3
    revert_model(ours)
    assert type(ours[0]) is nn.ReLU


def test_filter_fn():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1))
    report = convert_model(
        model, filter_fn=lambda module, name: module.out_channels > 4
    )
    assert [item.name for item in report.converted] == ['1']
    assert report.left[0].reason == 'filter_fn says no'
    with pytest.raises(TypeError, match='filter_fn'):
        convert_model(model, filter_fn='Conv2d')
