"""Statistics of channels against float64 and torch's batch norm."""

import pytest
import torch
from support.opcheck import opcheck
from support.pairs import in_turn

from mmactnn import ops
from mmactnn.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (5, 3),  # no plane
    (64, 32),
    (3, 7, 5),
    (2, 16, 4, 4),
    (3, 24, 7, 7),  # planes off the blocks of 8
    (2, 5, 7, 9),  # rows off them, too
    (1, 1, 4, 4),
    (2, 8, 3, 4, 5),
    (2, 264, 2, 2),  # more columns than a warp has lanes
    (40, 3, 32, 32),
)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def make(shape, dtype, device, channels_last=False, mean=0.0):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(shape, generator=generator) * 3 + mean
    x = x.to(device, dtype)
    if channels_last:
        x = x.to(memory_format=CHANNELS_LAST.get(len(shape)))
    return x


def layouts(shape):
    return (False, True) if len(shape) in CHANNELS_LAST else (False,)


def expect(x):
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.double(), dims, correction=0)
    return mean, var


def stats(x, eps=1e-5, momentum=0.1, running_mean=None, running_var=None):
    return ops.channel_stats(x, eps, momentum, running_mean, running_var)


@in_turn(by='dtype', shape=SHAPES, dtype=DTYPES)
def test_equals_float64(shape, dtype, device):
    for channels_last in layouts(shape):
        x = make(shape, dtype, device, channels_last)
        mean, var, invstd = stats(x, eps=1e-3)
        expected_mean, expected_var = expect(x)
        assert mean.dtype == var.dtype == invstd.dtype == torch.float32
        torch.testing.assert_close(
            mean.double(), expected_mean, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            var.double(), expected_var, rtol=2e-6, atol=0
        )
        torch.testing.assert_close(
            invstd.double(), (expected_var + 1e-3).rsqrt(), rtol=2e-6, atol=0
        )


@in_turn(mean=[1e3, -1e5], channels_last=[False, True])
def test_mean_far_from_zero(mean, channels_last, device):
    x = make((16, 8, 28, 28), torch.float32, device, channels_last, mean)
    expected_mean, expected_var = expect(x)
    actual_mean, actual_var, _ = stats(x)
    torch.testing.assert_close(
        actual_mean.double(), expected_mean, rtol=1e-7, atol=0
    )
    torch.testing.assert_close(
        actual_var.double(), expected_var, rtol=1e-4, atol=0
    )


@in_turn(channels_last=[False, True])
def test_first_element_far_from_the_others(channels_last, device):
    x = make((16, 8, 28, 28), torch.float32, device, channels_last)
    x[0, :, 0, 0] = 1e4
    expected_mean, expected_var = expect(x)
    actual_mean, actual_var, _ = stats(x)
    torch.testing.assert_close(
        actual_mean.double(), expected_mean, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        actual_var.double(), expected_var, rtol=1e-4, atol=0
    )


def test_constant_channels_have_no_variance(device):
    x = torch.full((4, 8, 5, 5), 0.1, device=device)
    mean, var, invstd = stats(x, eps=0.25)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1))
    assert var.amax() < 1e-12
    torch.testing.assert_close(invstd, torch.full_like(invstd, 2.0))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_running_statistics_are_those_of_torch(dtype, device):
    x = make((4, 6, 5, 5), torch.float32, device, mean=2.0)
    running = [
        torch.randn(6).to(device, dtype),
        torch.rand(6).to(device, dtype),
    ]
    expected = [value.float() for value in running]
    torch.nn.functional.batch_norm(x, *expected, training=True, momentum=0.3)
    stats(x, 1e-5, 0.3, *running)
    for actual, value in zip(running, expected):
        torch.testing.assert_close(actual, value.to(dtype))


def test_equals_reference(device):
    x = make((4, 6, 5, 5), torch.float32, device, mean=2.0)
    own = torch.rand(2, 6, device=device)
    twins = own.cpu().clone()
    found = stats(x, 1e-3, 0.3, *own)
    expected = reference.channel_stats(x.cpu(), 1e-3, 0.3, *twins)
    for actual, value in zip((*found, own), (*expected, twins), strict=True):
        torch.testing.assert_close(actual.cpu(), value)


def test_a_single_element_leaves_the_running_variance_undefined(device):
    running = torch.zeros(3, device=device), torch.ones(3, device=device)
    mean, var, _ = stats(torch.ones(1, 3, device=device), 1e-5, 0.5, *running)
    assert torch.equal(mean, torch.ones_like(mean)) and not var.any()
    assert torch.equal(running[0], torch.full_like(mean, 0.5))
    assert running[1].isnan().all()


@in_turn(shape=[(0, 3, 4), (4, 3, 0), (4, 0, 3)])
def test_empty(shape, device):
    running = torch.rand(shape[1], device=device)
    before = running.clone()
    x = torch.empty(shape, device=device)
    mean, var, invstd = stats(x, 0.25, 0.1, running, running.clone())
    assert mean.shape == var.shape == invstd.shape == (shape[1],)
    assert not mean.any() and not var.any()
    assert torch.equal(invstd, torch.full_like(invstd, 2.0))
    assert torch.equal(running, before)


@in_turn(value=[torch.inf, -torch.inf, torch.nan], channels_last=[False, True])
def test_only_the_channel_with_nan_or_inf_suffers(
    value, channels_last, device
):
    for shape in ((3, 8, 7, 7), (3, 5, 7, 7)):
        x = make(shape, torch.float32, device, channels_last)
        expected = expect(x)[1]
        x[1, 2, 3, 4] = value
        mean, var, _ = stats(x)
        others = torch.arange(shape[1], device=device) != 2
        assert not mean[2].isfinite() and var[2].isnan()
        torch.testing.assert_close(
            var[others].double(), expected[others], rtol=2e-6, atol=0
        )


def test_two_calls_are_equal(device):
    x = make((32, 64, 28, 28), torch.float16, device)
    for one, other in zip(stats(x), stats(x)):
        assert torch.equal(one, other)


def test_other_layouts_are_copied(device):
    base = make((6, 8, 10, 12), torch.float32, device)
    last = base.to(memory_format=torch.channels_last)
    views = (
        base[:, :, ::2],
        base[:, 1:6],
        base.transpose(0, 1),
        base.transpose(2, 3),
        last[:, 1:6],
        last[:, :, 1:],
    )
    for view in views:
        mean, var = expect(view)
        actual = stats(view)
        torch.testing.assert_close(actual[0].double(), mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(actual[1].double(), var, rtol=1e-5, atol=0)


def test_unaligned_start(device):
    base = make((1 + 4 * 8 * 16,), torch.float16, device)
    x = base[1:].view(4, 8, 4, 4)
    torch.testing.assert_close(
        stats(x)[1].double(), expect(x)[1], rtol=2e-6, atol=0
    )


def test_op_names_strides_that_it_does_not_take(device):
    x = torch.zeros(2, 4, 6, device=device)[:, :, ::2]
    with pytest.raises(RuntimeError, match=r'got strides \[24, 6, 2\]'):
        torch.ops.mmactnn.channel_stats.default(x, 1e-5, 0.1, None, None)


def test_errors(device):
    x = torch.zeros(2, 4, 6, device=device)
    mean = torch.zeros(4, device=device)
    with pytest.raises(ValueError, match='2 to 5 dimensions, got shape'):
        stats(x[0, 0])
    with pytest.raises(TypeError, match='float64'):
        stats(x.double())
    with pytest.raises(ValueError, match='both be None'):
        stats(x, running_mean=mean)
    with pytest.raises(ValueError, match=r'running_var must be of shape \(4,'):
        stats(x, running_mean=mean, running_var=mean[:3])
    with pytest.raises(RuntimeError, match='of one dtype'):
        stats(x, running_mean=mean, running_var=mean.half())
    with pytest.raises(RuntimeError, match='running_mean must be float32'):
        stats(x, running_mean=mean.double(), running_var=mean)
    with pytest.raises(RuntimeError, match='must be a contiguous'):
        strided = torch.zeros(8, device=device)[::2]
        stats(x, running_mean=strided, running_var=strided)


def test_opcheck(device):
    x = make((3, 8, 5, 5), torch.float32, device)
    running = torch.zeros(8, device=device), torch.ones(8, device=device)
    op = torch.ops.mmactnn.channel_stats.default
    opcheck(op, (x, 1e-5, 0.1, *running))
    opcheck(op, (x, 1e-5, 0.1, None, None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
class TestCuda:
    """Behaviour that only exists on a GPU."""

    @pytest.mark.parametrize('channels_last', [False, True])
    @pytest.mark.parametrize(
        'shape',
        [(256, 64, 56, 56), (64, 2048, 7, 7), (4, 40, 301, 299), (9, 3, 8, 9)],
        ids=str,
    )
    def test_many_splits(self, shape, channels_last):
        x = torch.randn(shape, device='cuda', dtype=torch.float16)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        mean, var = expect(x)
        actual = stats(x)
        torch.testing.assert_close(actual[0].double(), mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(actual[1].double(), var, rtol=1e-5, atol=0)

    def test_no_synchronisation(self):
        x = torch.randn(8, 16, 32, 32, device='cuda')
        running = torch.zeros(16, device='cuda'), torch.ones(16, device='cuda')
        stats(x, 1e-5, 0.1, *running)
        torch.cuda.set_sync_debug_mode('error')
        try:
            stats(x, 1e-5, 0.1, *running)
        finally:
            torch.cuda.set_sync_debug_mode('default')
