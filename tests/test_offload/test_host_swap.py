"""Swapping gives the same gradients, in bounded memory."""

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch
from support.lagging_transport import (
    LaggingTransport,
    PromptTransport,
    RefusingTransport,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn.codes.units import MIB
from mmactnn.offload import HostSwap, attached_swap
from mmactnn.offload.host_pool import HostPool, default_max_bytes

KIB = 2**10


class ConvNet(nn.Module):
    """Residual blocks: inputs that several layers share."""

    def __init__(self, channels=8, blocks=4):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.pool(x.to(memory_format=torch.channels_last))
        return self.head(x.mean((2, 3))).logsumexp(1).sum()


class Attention(nn.Module):
    """Views of one storage, transposed, expanded and sliced."""

    def __init__(self, channels=16):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.scale = nn.Parameter(torch.ones(1, 1, channels))

    def forward(self, x):
        x = x.flatten(1)[:, :768].unflatten(1, (48, 16))
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        y = self.out(y) * self.scale.expand_as(y)
        gate, value = (x + y).chunk(2, dim=2)
        first = (gate.sigmoid() * value)[:, ::2]
        return first.square().mean() + y[:1].exp().mean()


class Checkpointed(nn.Module):
    """Some blocks are computed again in the backward pass."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 1)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.stem(x).sigmoid()
        x = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return x.tanh().square().mean()


class Chain(nn.Module):
    """Every step keeps its result and nothing else."""

    def __init__(self, steps=6):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.steps = steps
        self.observe = None

    def forward(self, x):
        x = x + self.weight
        for _ in range(self.steps):
            x = x.sigmoid()
            if self.observe is not None:
                x.register_hook(self.observe)
        return x.sum()


MODELS = {
    'convolutions': ConvNet,
    'attention': Attention,
    'checkpoint': lambda: Checkpointed(False),
    'reentrant checkpoint': lambda: Checkpointed(True),
    'chain': Chain,
}


def images(device='cpu', size=16, batch=4):
    return torch.randn(batch, 3, size, size, device=device)


def swapping(model, transport=LaggingTransport, **settings):
    """A copy of a model that swaps, and its HostSwap."""
    twin = copy.deepcopy(model)
    settings = dict(min_bytes=0, window_mib=64 / KIB) | settings
    return twin, HostSwap(twin, transport=transport, **settings).attach()


def transport_of(swap):
    return swap._engine._transport


def used_bytes(swap):
    swap._engine.settle()
    return swap._engine.pool.used_bytes


def gradients(model, x, backward=None):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward() if backward is None else backward(y)
    # The weights of some models take no part.
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def top_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@pytest.fixture(params=[LaggingTransport, PromptTransport])
def transport(request):
    """Copies that are late, or done at once."""
    return request.param


@pytest.mark.parametrize('window_kib', [0.001, 40, 10**6])
@pytest.mark.parametrize('name', MODELS)
def test_gradients(name, window_kib, transport):
    model = MODELS[name]()
    twin, swap = swapping(model, transport, window_mib=window_kib / KIB)
    x = images()
    for _ in range(3):
        assert_equal(gradients(twin, x), gradients(model, x))
    assert swap.swapped_bytes > x.nbytes
    assert swap.host_bytes >= swap.swapped_bytes
    assert used_bytes(swap) == 0
    assert top_hooks() is None
    if window_kib < 1:
        assert transport_of(swap).copied_in


def test_autocast(transport):
    model = ConvNet()
    twin, swap = swapping(model, transport)
    x = images()
    with torch.autocast('cpu', torch.bfloat16):
        assert_equal(gradients(twin, x), gradients(model, x))
    assert swap.swapped_bytes > 0


def test_a_storage_is_swapped_once():
    class Model(nn.Linear):
        def forward(self, x):
            x = x.sigmoid()
            return super().forward(x) + x.square(), x[:, 1:].exp()

    model = Model(64, 64)
    twin, swap = swapping(model)
    x = torch.randn(32, 64, requires_grad=True)
    outputs = twin(x)
    # Results of sigmoid() and exp(); the weight stays.
    assert swap.swapped_bytes == x.nbytes + 32 * 63 * 4
    assert transport_of(swap).copied_out == [x.nbytes, 32 * 63 * 4]
    del outputs
    assert used_bytes(swap) == 0


def test_a_shared_storage_comes_back_once():
    class Model(nn.Linear):
        def forward(self, x):
            x = x.tanh()
            # Saved by the product twice and as the result of tanh().
            return super().forward(x * x).sum()

    twin, swap = swapping(Model(64, 64), PromptTransport)
    gradients(twin, torch.randn(32, 64))
    copied_in = transport_of(swap).copied_in
    assert sum(copied_in) <= swap.swapped_bytes


def test_small_views_go_alone():
    class Model(nn.Module):
        def __init__(self, data):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))
            self.data = data

        def forward(self, i):
            return (self.data[i : i + 3] * self.weight).sum()

    data = torch.randn(1000, 100)
    model = Model(data)
    twin, swap = swapping(model, PromptTransport)
    twin.data = data
    outputs = [twin(i) for i in (7, 500)]
    # Rounded to alignment, no more.
    assert 0 < swap.swapped_bytes <= 3 * 400 + 512
    expected = data[7:10].sum(0) + data[500:503].sum(0)
    twin.data = None
    del data, model
    sum(outputs).backward()
    assert_equal([twin.weight.grad], [expected])


def test_sizes_and_strides_come_back():
    base = torch.randn(6, 5, 4)
    tensors = [
        base,
        base.permute(2, 0, 1),
        base[1:, ::2, 3:],
        base[2:3].expand(7, 5, 4),
        base[..., 0].diagonal(),
        base[:0],
        base.view(torch.int32)[::3],
        torch.randn(3, 4, dtype=torch.complex64)[1],
        torch.randn(3, 4, dtype=torch.complex64).conj(),
        torch.tensor(3.0),
        torch.randn(4, 4).to_sparse(),
    ]
    expected = [tensor.clone() for tensor in tensors]
    metadata = [
        (t.dtype, t.size()) + ((t.stride(),) if not t.is_sparse else ())
        for t in tensors
    ]
    model = Chain(1)
    swap = HostSwap(model, 0, None, 1e-3, PromptTransport).attach()
    model(torch.ones(3))
    engine = swap._engine
    packed = [engine.pack(tensor) for tensor in tensors]
    del base, tensors
    engine.settle()
    for item, tensor, facts in zip(packed, expected, metadata):
        actual = engine.unpack(item)
        assert (actual.dtype, actual.size()) == facts[:2]
        if not actual.is_sparse:
            assert actual.stride() == facts[2]
        assert torch.equal(actual.to_dense(), tensor.to_dense())


def test_profile():
    twin, _ = swapping(Chain(3), PromptTransport)
    with torch.profiler.profile() as profile:
        gradients(twin, torch.randn(64))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts['mmactnn: swap out'] == counts['mmactnn: swap in'] == 3


def test_small_tensors_and_parameters_stay():
    model = ConvNet()
    twin, swap = swapping(model, min_bytes=4 * 8 * 16 * 16 * 4 + 1)
    x = images()
    assert_equal(gradients(twin, x), gradients(model, x))
    assert swap.swapped_bytes == 0
    wide = nn.Linear(1000, 2)
    twin, swap = swapping(wide, min_bytes=KIB)
    twin(torch.randn(1, 1000))
    assert swap.swapped_bytes == 4000


def test_observer():
    seen = []
    twin, swap = swapping(nn.Sequential(nn.Linear(64, 64), nn.Tanh()))
    swap.min_bytes = KIB
    swap.observer = lambda tensor, swapped: seen.append(
        (tensor.numel(), swapped)
    )
    twin(torch.randn(32, 64)).sum()
    assert seen == [(32 * 64, True), (32 * 64, True)]
    seen.clear()
    swap.observer = None
    twin(torch.randn(32, 64))
    assert not seen


def test_retain_graph(transport):
    def backward(y):
        y.backward(retain_graph=True)
        y.backward()

    model = ConvNet()
    twin, swap = swapping(model, transport)
    x = images()
    assert_equal(gradients(twin, x, backward), gradients(model, x, backward))
    assert used_bytes(swap) == 0


@pytest.mark.parametrize('reverse', [False, True])
def test_several_passes_before_backward(reverse, transport):
    def run(model):
        model.zero_grad()
        torch.manual_seed(1)
        losses = [model(images()) for _ in range(3)]
        for loss in reversed(losses) if reverse else losses:
            loss.backward()
        return [p.grad for p in model.parameters()]

    model = ConvNet()
    twin, swap = swapping(model, transport)
    for _ in range(2):
        assert_equal(run(twin), run(model))
    assert used_bytes(swap) == 0


def test_double_backward(transport):
    def backward(y):
        (grad,) = torch.autograd.grad(y, inputs, create_graph=True)
        grad.square().sum().backward()

    results = []
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    twin, _ = swapping(model, transport)
    for m in (model, twin):
        torch.manual_seed(2)
        inputs = torch.randn(16, 8, requires_grad=True)
        backward(m(inputs).sum())
        results.append([p.grad for p in m.parameters()][:-1])
    assert_equal(*results)


def test_forward_that_is_dropped(transport):
    twin, swap = swapping(ConvNet(), transport)
    y = twin(images())
    assert used_bytes(swap) >= swap.swapped_bytes
    del y
    assert used_bytes(swap) == 0
    assert swap.window_bytes == 0


def test_steady_state_allocates_nothing(transport):
    twin, swap = swapping(ConvNet(), transport)
    gradients(twin, images())
    allocated = list(transport_of(swap).allocated)
    for _ in range(3):
        gradients(twin, images())
    assert transport_of(swap).allocated == allocated
    assert sum(allocated) == swap.host_bytes


def test_window(transport):
    nbytes = 64 * KIB
    window = 3 * nbytes
    peaks = []

    def observe(grad):
        peaks.append(swap.window_bytes)

    twin, swap = swapping(Chain(12), transport, window_mib=window / MIB)
    swap.observer = lambda tensor, swapped: observe(None)
    twin.observe = observe
    gradients(twin, torch.randn(nbytes // 4))
    assert 0 < max(peaks) <= 2 * window


@pytest.mark.parametrize('ahead', [1, 2, 3])
def test_prefetch(ahead):
    """Each is on its way before it is needed, in the order of backward."""
    nbytes = 64 * KIB
    steps = 8
    fetched = []
    twin, swap = swapping(
        Chain(steps), PromptTransport, window_mib=ahead * nbytes / MIB
    )
    twin.observe = lambda grad: fetched.append(
        len(transport_of(swap).copied_in)
    )
    y = twin(torch.randn(nbytes // 4))
    # So that nothing is left of the forward pass.
    swap._engine.settle()
    y.backward()
    # Before the k-th backward step k have been fetched and used, and
    # the window ahead of them.
    # Hooks run after the gradient of the next step's input is there.
    expected = [min(steps, k + ahead) for k in range(1, steps + 1)]
    assert fetched == [0, *expected[:-1]]
    assert transport_of(swap).copied_in == steps * [nbytes]


def test_what_is_not_next_is_given_back(transport):
    twin, swap = swapping(Chain(1), transport, window_mib=1)
    twin(torch.ones(1))
    engine = swap._engine
    packed = [engine.pack(torch.full((KIB,), float(i))) for i in range(8)]
    engine.settle()
    assert engine.unpack(packed[-1])[0] == 7
    assert all(item.payload.held is not None for item in packed[:-1])
    assert engine.unpack(packed[0])[0] == 0
    engine.settle()
    assert all(item.payload.place.storage() is None for item in packed)
    assert swap.window_bytes == 0


def test_streams():
    """A tensor fetched for one stream may be used on another."""
    twin, swap = swapping(Chain(1), window_mib=1)
    twin(torch.ones(1))
    engine, streams = swap._engine, transport_of(swap)
    packed = [engine.pack(torch.full((KIB,), float(i))) for i in range(4)]
    engine.settle()
    engine.unpack(packed[3])
    fetched = engine._arriving._copies[-1]
    streams.stream = 'other'
    tensor = engine.unpack(packed[0])
    assert tensor[0] == 0
    ((shared, stream),) = streams.shared
    assert shared is tensor and stream == 'other'
    # The one that reads it, and the one that its memory goes back to.
    assert fetched.event.waiting == {'other', 'default'}


def test_what_is_still_there_is_not_fetched():
    twin, swap = swapping(Chain(4), window_mib=1)
    gradients(twin, torch.randn(64))
    assert transport_of(swap).copied_in == []


def test_limit_of_host_memory():
    twin, swap = swapping(ConvNet(), max_host_mib=0.25)
    with pytest.raises(RuntimeError) as error:
        twin(images())
    message = str(error.value)
    assert 'needs 0.03 MiB more' in message
    assert '0.23 MiB are allocated and 0.23 MiB in use' in message
    assert 'limit is 0.25 MiB' in message
    assert 'max_host_mib' in message
    assert top_hooks() is None
    assert swap.host_bytes <= 0.25 * MIB


def test_memory_that_cannot_be_pinned():
    twin, _ = swapping(ConvNet(), RefusingTransport)
    with pytest.raises(RuntimeError, match='refuses to pin') as error:
        twin(images())
    assert 'out of pages' in str(error.value.__cause__)


@pytest.mark.parametrize('is_swapped', [False, True])
def test_modified_after_it_was_saved(is_swapped):
    class Model(nn.Linear):
        def forward(self, x):
            y = super().forward(x).tanh()
            z = y * 2
            y.add_(1)
            return z + y

    twin, swap = swapping(Model(8, 8), min_bytes=0 if is_swapped else MIB)
    y = twin(torch.randn(4, 8)).sum()
    assert (swap.swapped_bytes > 0) == is_swapped
    with pytest.raises(RuntimeError, match='modified by an inplace') as error:
        y.backward()
    assert 'FloatTensor [4, 8]] is at version 1' in str(error.value)


def test_each_version_is_swapped(transport):
    class Model(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            # Saved as well, but nobody asks for its gradient.
            self.unused = y.square()
            y.mul_(3)
            return y.square().sum()

    model = Model(8, 8)
    twin, swap = swapping(model, transport, window_mib=1e-6)
    x = torch.randn(4, 8)
    assert_equal(gradients(twin, x), gradients(model, x))
    assert swap.swapped_bytes == 3 * x.nbytes


def test_exception_in_forward():
    class Model(nn.Linear):
        fail = True

        def forward(self, x):
            y = super().forward(x)
            if self.fail:
                raise ValueError('stop')
            return y

    twin, swap = swapping(Model(8, 8))
    with pytest.raises(ValueError, match='stop'):
        twin(torch.ones(2, 8))
    assert top_hooks() is None
    twin.fail = False
    twin(torch.ones(2, 8))
    assert swap.swapped_bytes == 64
    assert top_hooks() is None


def test_nested_forward():
    class Model(nn.Linear):
        def forward(self, x, depth=3):
            assert swap.is_on_top()
            if depth:
                x = self(x, depth - 1)
                assert swap.is_on_top()
            return super().forward(x).tanh()

    twin, swap = swapping(Model(8, 8))
    assert not swap.is_on_top()
    y = twin(torch.ones(2, 8))
    assert top_hooks() is None
    # The input, and the result of each level.
    assert swap.swapped_bytes == 5 * 64
    y.sum().backward()


def test_without_gradients_nothing_is_swapped():
    twin, swap = swapping(ConvNet())
    with torch.no_grad():
        twin(images())
    assert swap.swapped_bytes == swap.host_bytes == 0


def test_another_hook_that_fails():
    def fail(module, args):
        raise ValueError('stop')

    twin, swap = swapping(ConvNet())
    handle = twin.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match='stop'):
        twin(images())
    assert top_hooks() is None
    handle.remove()
    handle = twin.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(ValueError, match='stop'):
        twin(images())
    assert top_hooks() is None


def test_attach_and_detach():
    model = ConvNet()
    assert attached_swap(model) is None
    swap = HostSwap(model, 0, transport=LaggingTransport)
    assert swap.attach() is swap
    assert attached_swap(model) is swap
    with pytest.raises(RuntimeError, match='swaps already'):
        HostSwap(model).attach()
    x = images()
    y = model(x)
    before = swap.swapped_bytes
    assert before > 0
    swap.detach()
    swap.detach()
    assert attached_swap(model) is None
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    y.backward()
    model(x)
    assert swap.swapped_bytes == before
    assert used_bytes(swap) == 0
    swap.attach()
    model(x).backward()


@pytest.mark.parametrize(
    'duplicate',
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=['deepcopy', 'pickle'],
)
def test_copies_swap_by_themselves(duplicate):
    model = ConvNet()
    swap = HostSwap(model, 0, 100, 1, LaggingTransport).attach()
    x = images()
    y = model(x)
    twin = duplicate(model)
    other = attached_swap(twin)
    assert other is not swap and other.model is twin
    assert (other.min_bytes, other.max_host_mib, other.window_mib) == (
        0,
        100,
        1,
    )
    assert other.host_bytes == other.swapped_bytes == 0
    del y
    before = used_bytes(swap)
    assert_equal(gradients(twin, x), gradients(model, x))
    assert other.swapped_bytes == swap.swapped_bytes
    assert used_bytes(swap) == before == 0
    other.detach()
    assert attached_swap(model) is swap
    twin = duplicate(twin)
    assert attached_swap(twin) is None


def test_a_model_is_freed_at_once():
    gc.disable()
    try:
        twin, swap = swapping(ConvNet())
        twin(images())
        ref = weakref.ref(twin)
        del twin
        assert ref() is None
        assert swap.model is None
    finally:
        gc.enable()


def test_cpu_model_is_refused():
    model = ConvNet()
    swap = HostSwap(model).attach()
    with pytest.raises(RuntimeError, match='needs a model on a CUDA') as error:
        model(images())
    assert "'L3'" in str(error.value) and "'L0'" in str(error.value)
    assert 'parameters are on cpu' in str(error.value)
    assert top_hooks() is None
    with torch.no_grad():
        model(images())
    model.eval()
    model(images()).backward()
    assert swap.swapped_bytes == 0


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(min_bytes=-1), 'min_bytes must be 0 or more, got -1'),
        (dict(max_host_mib=0), 'max_host_mib must be positive, got 0'),
        (dict(window_mib=0), 'window_mib must be positive, got 0'),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        HostSwap(nn.ReLU(), **settings)


def test_pool():
    """No two pieces overlap, and all of it is one piece in the end."""
    sizes = []

    def allocate(nbytes):
        sizes.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    pool = HostPool(allocate, 2**20)
    random.seed(0)
    taken = []
    for i in range(500):
        if taken and random.random() < 0.5:
            extent, nbytes, value = taken.pop(random.randrange(len(taken)))
            assert pool.view(extent, nbytes).unique().tolist() == [value]
            pool.give(extent)
        elif pool.used_bytes < 2**18:
            nbytes = random.randint(1, 20000)
            extent = pool.take(nbytes)
            pool.view(extent, nbytes).fill_(i % 256)
            taken.append((extent, nbytes, i % 256))
    assert pool.used_bytes == sum(e.end - e.start for e, *_ in taken)
    for extent, *_ in taken:
        pool.give(extent)
    assert pool.used_bytes == 0
    assert sum(sizes) == pool.nbytes <= 2**20
    count = len(sizes)
    pool.take(max(sizes))
    assert len(sizes) == count


def test_pool_makes_use_of_the_limit():
    pool = HostPool(lambda n: torch.empty(n, dtype=torch.uint8), 3 * KIB)
    pool.take(2 * KIB)
    assert pool.nbytes == 2 * KIB
    pool.take(1)
    with pytest.raises(RuntimeError, match='limit'):
        pool.take(KIB)


def test_default_limit(monkeypatch):
    alone = default_max_bytes()
    assert 0 < alone < 2**50
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert default_max_bytes() == pytest.approx(alone / 4, rel=0.1)


@pytest.fixture
def cuda():
    """The GPU, with convolutions that repeat."""
    if not torch.cuda.is_available():
        pytest.skip('no GPU is available')
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    torch.cuda.synchronize()
    yield torch.device('cuda', torch.cuda.current_device())
    torch.backends.cudnn.deterministic = before


def on_gpu(model, **settings):
    settings = dict(min_bytes=KIB, window_mib=1) | settings
    return HostSwap(model, **settings).attach()


@pytest.mark.parametrize('window_mib', [0.01, 1, 1000])
@pytest.mark.parametrize('name', MODELS)
def test_cuda_gradients(name, window_mib, cuda):
    model = MODELS[name]().to(cuda)
    twin = copy.deepcopy(model)
    swap = on_gpu(twin, window_mib=window_mib)
    x = images(cuda, size=32)
    for _ in range(3):
        assert_equal(gradients(twin, x), gradients(model, x))
    assert swap.swapped_bytes > x.nbytes


def test_cuda_peak_memory(cuda):
    def peak(model):
        gradients(model, x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(model, x)
        return torch.cuda.max_memory_allocated() - before

    model = ConvNet(64, blocks=12).to(cuda)
    twin = copy.deepcopy(model)
    x = images(cuda, size=128, batch=8)
    exact = peak(model)
    model.zero_grad()
    swap = on_gpu(twin, window_mib=40)
    assert peak(twin) < exact - swap.swapped_bytes / 2


def test_cuda_never_blocks(cuda):
    model = ConvNet(64).to(cuda)
    on_gpu(model, window_mib=4)
    x = images(cuda, size=64)
    for _ in range(2):
        model(x).backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        model(x).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_cuda_retain_graph(cuda):
    def backward(y):
        y.backward(retain_graph=True)
        y.backward()

    model = ConvNet(32).to(cuda)
    twin = copy.deepcopy(model)
    on_gpu(twin)
    x = images(cuda, size=64)
    assert_equal(gradients(twin, x, backward), gradients(model, x, backward))


def test_cuda_gradient_accumulation(cuda):
    def run(model, xs):
        model.zero_grad()
        losses = [model(x) for x in xs]
        for loss in losses:
            loss.backward()
        return [p.grad for p in model.parameters()]

    model = ConvNet(32).to(cuda)
    twin = copy.deepcopy(model)
    swap = on_gpu(twin)
    xs = [images(cuda, size=64) for _ in range(3)]
    for _ in range(2):
        assert_equal(run(twin, xs), run(model, xs))
    torch.cuda.synchronize()
    assert used_bytes(swap) == 0


def test_cuda_limit(cuda):
    model = ConvNet(32).to(cuda)
    on_gpu(model, max_host_mib=1)
    with pytest.raises(RuntimeError, match='limit is 1.00 MiB'):
        model(images(cuda, size=64))
    assert top_hooks() is None


def test_cuda_memory_is_not_reused_too_early(cuda):
    """Freed memory is overwritten at once, while copies are late."""

    class Overwriting(Chain):
        def forward(self, x):
            x = x + self.weight
            for _ in range(self.steps):
                x = x.sigmoid()
                x.register_hook(overwrite)
                overwrite()
            return x.sum()

    def overwrite(grad=None):
        for _ in range(4):
            torch.full((nbytes // 4,), float('nan'), device=cuda)
        for stream in late:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10**6)

    late = []
    nbytes = 8 * MIB
    model = Overwriting(30).to(cuda)
    x = torch.randn(nbytes // 4, device=cuda)
    expected = gradients(model, x)
    swap = on_gpu(model, window_mib=17)
    assert_equal(gradients(model, x), expected)
    late += [transport_of(swap)._out, transport_of(swap)._in]
    for _ in range(4):
        assert_equal(gradients(model, x), expected)
    assert swap.swapped_bytes >= 30 * nbytes


def test_cuda_several_streams(cuda):
    """Layers on streams of their own, and their backward passes."""

    class Model(Chain):
        def forward(self, x):
            x = x + self.weight
            for i in range(self.steps):
                current = torch.cuda.current_stream()
                side = streams[i % 2]
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    y = x.sigmoid()
                x.record_stream(side)
                current.wait_stream(side)
                y.record_stream(current)
                x = y
            return x.sum()

    streams = [torch.cuda.Stream() for _ in range(2)]
    model = Model(20).to(cuda)
    x = torch.randn(2 * MIB, device=cuda)
    expected = gradients(model, x)
    on_gpu(model, window_mib=20)
    for _ in range(5):
        assert_equal(gradients(model, x), expected)


def test_cuda_other_stream(cuda):
    """Forward and backward on a stream that is not the default one."""
    model = ConvNet(32).to(cuda)
    twin = copy.deepcopy(model)
    on_gpu(twin)
    x = images(cuda, size=64)
    expected = gradients(model, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stream):
            actual = gradients(twin, x)
        stream.synchronize()
        assert_equal(actual, expected)
