"""Large segments in pieces of the batch, and branch by branch."""

import copy
import pickle

import pytest
import torch
from support.live import LiveBytes
from support.torchvision_stub import need_mmpretrain
from support.transformer import Block, relative
from torch import nn

from mmactnn import convert_model
from mmactnn.segments import parts
from mmactnn.segments.branches import Branches
from mmactnn.segments.draws import Draws


class DropPath(nn.Module):
    """Stochastic depth, with random numbers drawn one way or another."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        shape = (len(x), *[1] * (x.dim() - 1))
        if self.how == 'rand':
            mask = (0.5 + torch.rand(shape, device=x.device)).floor()
        elif self.how == 'bernoulli':
            mask = x.new_empty(shape).bernoulli_(0.5)
            mask.div_(0.5)
        elif self.how == 'all':
            mask = torch.rand(1).round() + 0.5
        else:
            mask = 1
        return x * mask


class Deep(Block):
    """Block with stochastic depth and a buffer."""

    def __init__(self, how='none', width=64):
        super().__init__(width)
        self.path = DropPath(how)
        self.register_buffer('scale', torch.ones(1))

    def forward(self, x):
        return super().forward(self.path(x)) * self.scale


class Centred(Block):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Counting(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer('calls', torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm1d(32)

    def forward(self, x):
        return self.block(self.norm(x))


def build(make, depth=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 64), nn.Sequential(*(make() for _ in range(depth)))
    )


def batch(samples=8, tokens=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, tokens, 16, generator=generator)


def step(model, x, seed=2):
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(x)
    after = torch.rand(1)
    output.square().sum().backward()
    grads = [p.grad.flatten() for p in model.parameters()]
    return output.detach(), torch.cat(grads), after


def convert(model, monkeypatch, most, tokens=32):
    """Convert blocks; ``most``: bytes that live, of those of a sample."""
    convert_model(model, 'L3R', include=['1.*'])
    size = model[1][0]._parts._bytes((torch.empty(1, tokens, 64),))
    monkeypatch.setattr(parts, 'MAX_BYTES', most * size)
    return model


def kinds(model):
    return [block._parts._pieces.kinds for block in model[1]]


class TestPieces:
    @pytest.mark.parametrize('how', ['none', 'rand', 'bernoulli', 'all'])
    def test_as_the_whole_batch(self, how, monkeypatch):
        """Output and random numbers are those of exact training."""
        model, x = build(lambda: Deep(how)), batch(7)
        output, exact, drawn = step(model, x)
        convert(model, monkeypatch, 2)
        expected = dict(none=(), all=(False,)).get(how, (True,))
        for _ in range(2):
            found, coded, after = step(model, x)
            assert kinds(model) == [{None: expected}] * 2
            torch.testing.assert_close(found, output)
            assert 0 < relative(coded, exact) < 0.02
            assert torch.equal(after, drawn)

    def test_autocast(self, monkeypatch):
        """Weights that measuring casts without gradients are not used."""
        model, x = build(Block), batch()

        def run():
            with torch.autocast('cpu', torch.bfloat16):
                return step(model, x)

        output, exact, _ = run()
        convert(model, monkeypatch, 2)
        for _ in range(2):
            found, coded, _ = run()
            assert kinds(model) == [{None: ()}] * 2
            torch.testing.assert_close(found, output)
            assert 0 < relative(coded, exact) < 0.05

    def test_peak(self, monkeypatch):
        peaks = []
        for most in (8, 2, 1):
            model, x = build(Block), batch(8, 128)
            convert(model, monkeypatch, most, 128)
            step(model, x)
            with LiveBytes() as live:
                step(model, x)
            peaks.append(live.peak)
        assert peaks[1] < 0.5 * peaks[0]
        assert peaks[2] < 0.8 * peaks[1]

    @pytest.mark.parametrize(
        'make', [Centred, Counting, Normed, lambda: Block(dropout=0.1)]
    )
    def test_whole_batches(self, make, monkeypatch):
        """Of blocks that read, draw or write something for all samples."""
        model, x = build(make), batch()
        other = copy.deepcopy(model)
        output, exact, drawn = step(other, x)
        convert(model, monkeypatch, 2)
        found, coded, after = step(model, x)
        assert kinds(model) == [{None: None}] * 2
        assert torch.equal(found, output)
        assert torch.equal(after, drawn)
        assert 0 < relative(coded, exact) < 0.02
        for a, b in zip(model.buffers(), other.buffers()):
            assert torch.equal(a, b)

    def test_hooks_see_whole_batches(self, monkeypatch):
        model = convert(build(Block), monkeypatch, 2)
        seen = []
        model[1][0].fc1.register_forward_hook(
            lambda module, args, output: seen.append(len(output))
        )
        step(model, batch())
        assert seen == [8, 8]
        assert list(map(len, kinds(model))) == [0, 1]

    def test_small_batches_are_whole(self, monkeypatch):
        model = convert(build(Block), monkeypatch, 2)
        step(model, batch(2))
        assert kinds(model) == [{}, {}]

    def test_other_numbers_are_an_error(self):
        draws = Draws(4, (True,))
        with draws.passing(0, 2):
            torch.rand(2, 3)
        with pytest.raises(RuntimeError, match='other random numbers'):
            with draws.passing(2, 4):
                torch.rand(2, 4)

    @pytest.mark.parametrize(
        'clone',
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=['deepcopy', 'pickle'],
    )
    def test_copies(self, clone, monkeypatch):
        model = convert(build(Block), monkeypatch, 0.7)
        x = batch()
        step(model, x)
        twin = clone(model)
        assert kinds(twin) == [{}, {}]
        torch.testing.assert_close(step(twin, x)[0], step(model, x)[0])
        assert kinds(twin) == kinds(model) == [{0: (), 1: ()}] * 2


class Own(nn.Module):
    """Names of no package, an argument that is no tensor, a flag."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)
        self.mix = nn.Linear(64, 64)
        self.feed = nn.Sequential(
            nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)
        )
        self.gamma = nn.Parameter(torch.ones(64))
        self.early = False

    def forward(self, x, sizes=None):
        skip = x
        x = skip + self.gamma * self.mix(self.first(x))
        if self.early:
            return x
        return x + self.feed(self.second(x))


class TestBranches:
    def test_exact_and_lower_peak(self, monkeypatch):
        x, peaks = batch(1, 512), []
        output, exact, _ = step(build(Own), x)
        for most in (1, 0.5):
            model = convert(build(Own), monkeypatch, most, 512)
            step(model, x)
            with LiveBytes() as live:
                found, coded, _ = step(model, x)
            peaks.append(live.peak)
            assert torch.equal(found, output)
            assert 0 < relative(coded, exact) < 0.02
        assert peaks[1] < 0.85 * peaks[0]

    def test_guards(self, monkeypatch):
        """A changed attribute means another forward pass."""
        model, x = build(Own), batch(1)
        other = copy.deepcopy(model)
        convert(model, monkeypatch, 0.5)
        step(model, x)
        for block in (*model[1], *other[1]):
            block.early = True
            for name in ('second', 'feed'):
                getattr(block, name).requires_grad_(False)
        outputs = []
        for net in (model, other):
            outputs.append(net(x))
            outputs[-1].sum().backward()
        assert torch.equal(*outputs)

    def branches(self, block, *args, **kwargs):
        sizes = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in block.named_modules()
        }
        found = Branches(sizes).find(block, type(block), args, kwargs)
        if found is None:
            return None
        plan, _ = found
        return [
            [s.target[0] for s in b.steps if s.kind == 'call_module']
            for b in plan.branches
        ]

    def test_cut(self):
        block, x = Own(), torch.randn(2, 32, 64)
        expected = [['first', 'mix'], ['second', 'feed']]
        assert self.branches(block, x) == expected
        assert self.branches(block, x=x) == expected
        assert self.branches(block, x, (4, 8)) == expected
        assert self.branches(block, [x]) is None
        assert self.branches(block, x, x, x) is None
        assert self.branches(Block(), x) is not None

    def test_one_branch(self):
        class Whole(Own):
            def forward(self, x):
                return x + self.feed(self.mix(self.first(x)))

        assert self.branches(Whole(), torch.randn(2, 32, 64)) is None

    def test_types_of_arguments(self):
        """A trace stands for tensors where the forward pass reads types."""

        class Checked(Own):
            def forward(self, x, sizes):
                if isinstance(sizes, torch.Tensor):
                    return super().forward(x)
                return x + self.feed(x)

        block, x = Checked(), torch.randn(2, 32, 64)
        assert self.branches(block, x, torch.ones(2)) is not None
        assert self.branches(block, x, (4, 8)) is None

    def test_swin(self):
        need_mmpretrain()
        from mmpretrain.models.backbones.swin_transformer import SwinBlock
        from mmpretrain.models.utils import ShiftWindowMSA

        block, x = SwinBlock(32, 2, window_size=4), torch.randn(1, 64, 32)
        assert isinstance(block.attn, ShiftWindowMSA)
        assert self.branches(block, x, (8, 8)) == [
            ['norm1', 'attn'],
            ['norm2', 'ffn'],
        ]
