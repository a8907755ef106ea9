"""Cross entropy of resized logits, against torch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.opcheck import opcheck
from support.pairs import in_turn

from mmactnn import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative, of losses and of gradients: the large logits are rounded.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
IGNORED = 255

# Sizes of logits and of labels: enlarged by whole and other factors, equal,
# made smaller, of one place, and by much more along one axis.
SIZES = [
    ((2, 5, 4, 6), (32, 48)),
    ((1, 3, 7, 5), (13, 17)),
    ((2, 4, 8, 8), (8, 8)),
    ((1, 3, 9, 11), (4, 5)),
    ((2, 3, 1, 1), (5, 4)),
    ((2, 3, 5, 5), (1, 1)),
    ((1, 2, 3, 4), (100, 3)),
    ((1, 300, 3, 3), (7, 9)),
]
LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'strided': lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


def make(size, out, device, dtype=torch.float32, label_dtype=torch.int64):
    torch.manual_seed(0)
    logits = (3 * torch.randn(size, device=device)).to(dtype)
    labels = torch.randint(min(size[1], 250), (size[0], *out), device=device)
    labels[torch.rand(labels.shape, device=device) < 0.2] = IGNORED
    weight = torch.rand(size[1], device=device)
    scale = torch.randn(labels.shape, device=device)
    return logits, labels.to(label_dtype), weight, scale


def reference(logits, labels, weight, scale, align_corners):
    """Losses and gradient in float64, of large logits in their own dtype."""
    x = logits.detach().double().requires_grad_()
    large = F.interpolate(
        x, labels.shape[1:], mode='bilinear', align_corners=align_corners
    )
    losses = F.cross_entropy(
        large,
        labels.long(),
        None if weight is None else weight.double(),
        ignore_index=IGNORED,
        reduction='none',
    )
    upstream = torch.ones_like(losses) if scale is None else scale.double()
    losses.backward(upstream)
    return losses.detach(), x.grad, large.detach()


def run(logits, labels, weight, scale, align_corners):
    settings = align_corners, IGNORED
    losses, log_sums, hits = ops.resized_cross_entropy(
        logits, labels, weight, *settings
    )
    gradient = ops.resized_cross_entropy_backward(
        logits, labels, log_sums, weight, scale, *settings
    )
    return losses, log_sums, hits, gradient


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    bound = tolerance * max(expected.abs().max().item(), 1.0)
    assert (found.double() - expected).abs().max().item() <= bound


@in_turn(
    by='sizes',
    sizes=SIZES,
    align_corners=[False, True],
    weighted=[False, True],
    scaled=[False, True],
    label_dtype=[torch.int64, torch.uint8],
)
def test_against_float64(
    sizes, align_corners, weighted, scaled, label_dtype, device
):
    x, labels, weight, scale = make(*sizes, device, label_dtype=label_dtype)
    weight, scale = weight if weighted else None, scale if scaled else None
    losses, log_sums, hits, gradient = run(
        x, labels, weight, scale, align_corners
    )
    expected = reference(x, labels, weight, scale, align_corners)
    large = expected[2]
    assert_close(losses, expected[0], 2e-6)
    assert_close(log_sums, large.logsumexp(1), 2e-6)
    assert_close(gradient, expected[1], 2e-6)
    assert gradient.dtype == losses.dtype == torch.float32
    right = (large.argmax(1) == labels.long()) & (labels != IGNORED)
    # A few pairs of logits may differ by less than float32 resolves.
    assert (hits.bool() != right).sum() <= 1


@in_turn(by='dtype', dtype=DTYPES, layout=list(LAYOUTS))
def test_dtypes_and_layouts(dtype, layout, device):
    x, labels, weight, scale = make((2, 5, 4, 6), (32, 48), device, dtype)
    x = LAYOUTS[layout](x)
    losses, _, _, gradient = run(x, labels, weight, scale, False)
    expected = reference(x, labels, weight, scale, False)
    assert_close(losses, expected[0], TOLERANCES[dtype])
    assert_close(gradient, expected[1], TOLERANCES[dtype])


@in_turn(dtype=[torch.float16, torch.bfloat16])
def test_large_logits_are_rounded_as_torch_rounds_them(dtype, device):
    x, labels, *_ = make((2, 5, 4, 6), (32, 48), device, dtype)
    large = F.interpolate(x, (32, 48), mode='bilinear')
    expected = F.cross_entropy(
        large.double(), labels, ignore_index=IGNORED, reduction='none'
    )
    losses, *_ = ops.resized_cross_entropy(x, labels, None, False, IGNORED)
    # Ten times as close as rounding would be: hardly a pixel differs by one.
    assert (losses - expected).abs().mean() < 0.1 * torch.finfo(dtype).eps


def test_all_ignored(device):
    x, labels, *_ = make((2, 5, 4, 6), (8, 8), device)
    labels.fill_(IGNORED)
    losses, _, hits, gradient = run(x, labels, None, None, False)
    assert not losses.any() and not hits.any() and not gradient.any()


def test_ignore_index_may_be_a_class(device):
    x, labels, *_ = make((2, 5, 4, 6), (8, 8), device)
    labels[labels == IGNORED] = 0
    losses, _, hits = ops.resized_cross_entropy(x, labels, None, False, 0)
    large = F.interpolate(x, (8, 8), mode='bilinear')
    expected = F.cross_entropy(large, labels, ignore_index=0, reduction='none')
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        hits.bool(), (large.argmax(1) == labels) & (labels != 0)
    )


@pytest.mark.parametrize('label', [5, -1, 254])
def test_labels_of_no_class_are_nan(label, device):
    x, labels, *_ = make((1, 5, 4, 4), (4, 4), device)
    labels[0, 1, 2] = label
    losses, _, hits, gradient = run(x, labels, None, None, False)
    assert losses.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert gradient[0, :, 1, 2].isnan().all() and not hits[0, 1, 2]
    assert gradient.isnan().sum() == 5


class TestNumbersThatAreNotFinite:
    def test_masked_classes(self, device):
        x, labels, *_ = make((2, 5, 4, 6), (8, 12), device)
        x[:, 1] = -math.inf
        labels[labels == 1] = 0
        losses, _, _, gradient = run(x, labels, None, None, True)
        large = F.interpolate(
            x, labels.shape[1:], mode='bilinear', align_corners=True
        )
        expected = F.cross_entropy(
            large, labels, ignore_index=IGNORED, reduction='none'
        )
        assert torch.equal(losses.isnan(), expected.isnan())
        valid = ~expected.isnan()
        torch.testing.assert_close(
            losses[valid], expected[valid], rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize('value', [math.nan, math.inf])
    def test_spread_over_their_pixels(self, value, device):
        x, labels, *_ = make((1, 5, 4, 4), (4, 4), device)
        labels[labels == IGNORED] = 2
        x[0, 2, 1, 1] = value
        losses, _, _, gradient = run(x, labels, None, None, False)
        assert not losses[0, 1, 1].isfinite()
        assert not gradient[0, 2, 1, 1].isfinite()
        assert losses[0, 3, 3].isfinite()

    def test_large_numbers(self, device):
        x, labels, weight, scale = make((2, 5, 4, 6), (32, 48), device)
        x = x * 1e4
        losses, _, _, gradient = run(x, labels, weight, scale, False)
        expected = reference(x, labels, weight, scale, False)
        torch.testing.assert_close(
            losses.double(), expected[0], rtol=1e-4, atol=1e-2
        )
        assert gradient.isfinite().all()


def test_no_image(device):
    x, labels, *_ = make((0, 5, 4, 6), (8, 8), device)
    losses, log_sums, hits, gradient = run(x, labels, None, None, False)
    assert losses.shape == log_sums.shape == hits.shape == (0, 8, 8)
    assert gradient.shape == x.shape


def test_gradient_is_the_same_in_every_run(device):
    arguments = make((2, 19, 16, 16), (128, 128), device)
    first = run(*arguments, False)[3]
    assert torch.equal(first, run(*arguments, False)[3])


def test_classes_in_several_pieces(device):
    """Row sums of all classes of these would be 64 MiB."""
    if device.type == 'cpu':
        pytest.skip('the CPU takes one class of an image at a time')
    x, labels, *_ = make((2, 32, 128, 256), (1024, 512), device)
    losses, _, _, gradient = run(x, labels, None, None, False)
    expected = reference(x, labels, None, None, False)
    assert_close(losses, expected[0], 1e-5)
    assert_close(gradient, expected[1], 1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        'change, match',
        [
            (dict(labels=torch.zeros(2, 8, 8)), 'int64 or uint8'),
            (
                dict(labels=torch.zeros(3, 8, 8, dtype=torch.int64)),
                'with the N of the logits',
            ),
            (dict(logits=torch.zeros(2, 5, 4)), r'shape \[N, C, h, w\]'),
            (dict(class_weight=torch.ones(4)), r'shape \[5\]'),
        ],
    )
    def test_arguments(self, change, match):
        logits, labels, *_ = make((2, 5, 4, 6), (8, 8), 'cpu')
        arguments = dict(logits=logits, labels=labels, class_weight=None)
        with pytest.raises(RuntimeError, match=match):
            ops.resized_cross_entropy(
                **{**arguments, **change},
                align_corners=False,
                ignore_index=IGNORED,
            )

    def test_dtype(self):
        logits, labels, *_ = make((2, 5, 4, 6), (8, 8), 'cpu')
        with pytest.raises(TypeError, match='float64'):
            ops.resized_cross_entropy(
                logits.double(), labels, None, False, IGNORED
            )

    def test_scale(self):
        logits, labels, *_ = make((2, 5, 4, 6), (8, 8), 'cpu')
        log_sums = torch.zeros(2, 8, 8)
        with pytest.raises(RuntimeError, match="labels' shape"):
            ops.resized_cross_entropy_backward(
                logits, labels, log_sums, None, log_sums[:1], False, IGNORED
            )


def test_opcheck(device):
    x, labels, weight, scale = make((2, 5, 4, 6), (8, 8), device)
    library = torch.ops.mmactnn
    opcheck(
        library.resized_cross_entropy.default, (x, labels, weight, True, 255)
    )
    log_sums = torch.zeros(labels.shape, device=device)
    opcheck(
        library.resized_cross_entropy_backward.default,
        (x, labels, log_sums, None, scale, False, 255),
    )
