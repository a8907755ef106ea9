"""Losses that keep gradients, against torch."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.layers import (
    assert_same_bits,
    at_level,
    count_packs,
    relative_error,
    saved_tensors,
)
from support.pairs import in_turn
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmactnn import (
    QCrossEntropyLoss,
    QLosses,
    QResizedCrossEntropy,
    RoundingGenerator,
    convert_model,
    measure_activations,
    revert_model,
)
from mmactnn.layers.losses import Losses, ResizedCrossEntropy

IGNORED = 255


def seeded(layer, seed=0):
    layer.quantizer.generator = RoundingGenerator(seed=seed)
    return layer


def run(layer, x, *args, **kwargs):
    """Loss, other results, and gradient of three times the loss."""
    leaf = x.detach().clone().requires_grad_()
    loss, correct = layer(leaf * 1, *args, **kwargs)
    (3 * loss.double().sum()).backward()
    return loss.detach(), correct, leaf.grad


class TestResizedCrossEntropy:
    @pytest.fixture
    def x(self, device):
        torch.manual_seed(0)
        return torch.randn(2, 5, 6, 7, device=device)

    @pytest.fixture
    def labels(self, device):
        torch.manual_seed(1)
        labels = torch.randint(5, (2, 24, 28), device=device)
        return labels.where(torch.rand(labels.shape, device=device) > 0.2, 255)

    @in_turn(
        reduction=['none', 'sum', 'mean'],
        weighted=[False, True],
        by_pixel=[False, True],
        align_corners=[False, True],
        channels_last=[False, True],
    )
    def test_against_torch(
        self,
        reduction,
        weighted,
        by_pixel,
        align_corners,
        channels_last,
        x,
        labels,
    ):
        options = dict(
            class_weight=torch.rand(5, device=x.device) if weighted else None,
            pixel_weight=torch.rand(labels.shape, device=x.device)
            if by_pixel
            else None,
            ignore_index=IGNORED,
            align_corners=align_corners,
            reduction=reduction,
        )
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        doubles = {
            key: value.double() if isinstance(value, torch.Tensor) else value
            for key, value in options.items()
        }
        expected = run(ResizedCrossEntropy(), x.double(), labels, **doubles)
        found = run(QResizedCrossEntropy(), x, labels, **options)
        torch.testing.assert_close(
            found[0].double(), expected[0], rtol=1e-5, atol=1e-5
        )
        assert found[1] == expected[1] and found[1].dtype == torch.int64
        assert relative_error(found[2], expected[2].float()) < 1e-5
        assert found[2].dtype == torch.float32

    def test_mean_is_that_of_torch(self, x, labels):
        weight = torch.rand(5, device=x.device)
        large = F.interpolate(x, labels.shape[1:], mode='bilinear')
        expected = F.cross_entropy(large, labels, weight, ignore_index=IGNORED)
        for layer in (ResizedCrossEntropy(), QResizedCrossEntropy()):
            loss, _ = layer(x.requires_grad_(), labels, weight, None, IGNORED)
            torch.testing.assert_close(loss, expected)

    def test_nothing_but_ignored_pixels(self, x, labels):
        labels = torch.full_like(labels, IGNORED)
        for reduction in ('mean', 'sum', 'none'):
            options = dict(ignore_index=IGNORED, reduction=reduction)
            expected = run(ResizedCrossEntropy(), x, labels, **options)
            found = run(QResizedCrossEntropy(), x, labels, **options)
            torch.testing.assert_close(found, expected, equal_nan=True)

    @in_turn(dtype=[torch.float16, torch.bfloat16])
    def test_autocast(self, dtype, x, labels):
        results = []
        for layer in (ResizedCrossEntropy(), QResizedCrossEntropy()):
            with torch.autocast(x.device.type, dtype):
                results.append(
                    run(layer, x.to(dtype), labels, ignore_index=IGNORED)
                )
        expected, found = results
        assert found[0].dtype == expected[0].dtype == torch.float32
        assert found[2].dtype == expected[2].dtype == dtype
        eps = torch.finfo(dtype).eps
        assert (found[0] - expected[0]).abs() < eps
        assert relative_error(found[2].float(), expected[2].float()) < 4 * eps

    @in_turn(dtype=[torch.float16, torch.bfloat16])
    def test_without_autocast(self, dtype, x, labels):
        x = x.to(dtype)
        options = dict(ignore_index=IGNORED, reduction='none')
        expected = run(ResizedCrossEntropy(), x, labels, **options)
        found = run(QResizedCrossEntropy(), x, labels, **options)
        assert found[0].dtype == expected[0].dtype == dtype

    @pytest.mark.parametrize('level', ['L0', 'eval', 'no grad'])
    def test_exact(self, level, x, labels, monkeypatch):
        layer = at_level(
            QResizedCrossEntropy(), 'L0' if level == 'L0' else 'L3'
        )
        layer.train(level != 'eval')
        with torch.set_grad_enabled(level != 'no grad'):
            found = layer(x.requires_grad_(), labels, None, None, IGNORED)
            expected = ResizedCrossEntropy()(x, labels, None, None, IGNORED)
        assert_same_bits(found[0], expected[0])
        assert found[1] == expected[1]

    def test_what_is_kept(self, x, labels):
        x.requires_grad_()
        layer = QResizedCrossEntropy()
        pixels = labels.numel()
        for reduction in ('sum', 'mean'):
            with measure_activations(layer) as meter:
                layer(x * 1, labels, None, None, IGNORED, False, reduction)
            # The gradient, and what divides the sum.
            assert x.nbytes <= meter.saved_bytes <= x.nbytes + 8
            # Logarithms of the softmax, and labels.
            exact = 5 * pixels * 4 + pixels * 8
            assert exact <= meter.exact_bytes <= exact + 8
        with measure_activations(layer) as meter:
            layer(x * 1, labels, None, None, IGNORED, False, 'none')
        assert meter.saved_bytes == x.nbytes + labels.nbytes

    def test_large_gradients_are_codes(self, device):
        torch.manual_seed(0)
        x = torch.randn(1, 64, 64, 80, device=device)
        labels = torch.randint(64, (1, 40, 40), device=device)
        layer = seeded(QResizedCrossEntropy())
        expected = run(ResizedCrossEntropy(), x, labels)
        first = run(layer, x, labels)
        assert 1e-4 < relative_error(first[2], expected[2]) < 0.02
        draws = [run(layer, x, labels)[2] for _ in range(7)]
        mean = torch.stack([first[2], *draws]).mean(0)
        assert relative_error(mean, expected[2]) < 0.5 * relative_error(
            first[2], expected[2]
        )
        x.requires_grad_()
        with measure_activations(layer) as meter:
            layer(x, labels, reduction='sum')
        assert x.nbytes / 4 < meter.saved_bytes < x.nbytes / 3.8

    def test_generator_draws_no_random_numbers_of_torch(self, x, labels):
        before = torch.get_rng_state()
        run(QResizedCrossEntropy(), x, labels, ignore_index=IGNORED)
        assert torch.equal(torch.get_rng_state(), before)

    def test_labels_of_no_class(self, x, labels):
        labels[0, 0, 0] = 7
        if x.is_cuda:
            loss, *_ = run(QResizedCrossEntropy(), x, labels, None, None, 255)
            assert loss.isnan()
        else:
            with pytest.raises(IndexError, match='Target 7 is out of bounds'):
                run(QResizedCrossEntropy(), x, labels, None, None, IGNORED)

    def test_errors(self, x, labels):
        with pytest.raises(ValueError, match="got 'max'"):
            run(QResizedCrossEntropy(), x, labels, reduction='max')
        with pytest.raises(
            (RuntimeError, ValueError), match='size mismatch|batch'
        ):
            run(QResizedCrossEntropy(), x, labels[:1])

    def test_double_backward(self, x, labels):
        x.requires_grad_()
        loss, _ = QResizedCrossEntropy()(x, labels, ignore_index=IGNORED)
        (grad,) = torch.autograd.grad(loss * loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match='QResizedCrossEntropy.*twice'):
            grad.sum().backward()


CASES = {
    'small': ((64, 10), (64,), {}),
    'large': ((512, 1000), (512,), {}),
    'smoothing': ((512, 1000), (512,), dict(label_smoothing=0.1)),
    'images': ((2, 21, 96, 96), (2, 96, 96), dict(ignore_index=3)),
    'sum': ((2, 21, 96, 96), (2, 96, 96), dict(reduction='sum')),
    'none': ((2, 21, 96, 96), (2, 96, 96), dict(reduction='none')),
}


class TestCrossEntropyLoss:
    @pytest.mark.parametrize('case', CASES.values(), ids=list(CASES))
    def test_against_torch(self, case, device):
        size, label_size, options = case
        torch.manual_seed(0)
        x = torch.randn(size, device=device)
        labels = torch.randint(size[1], label_size, device=device)

        def outputs(layer):
            return run(lambda x, y: (layer(x, y), None), x, labels)

        expected = outputs(nn.CrossEntropyLoss(**options))
        found = outputs(seeded(QCrossEntropyLoss(**options)))
        assert_same_bits(found[0], expected[0])
        exact = x.nbytes < 2**20 or options.get('reduction') == 'none'
        error = relative_error(found[2], expected[2])
        assert error < 1e-6 if exact else 1e-4 < error < 0.03

    def test_probabilities_that_need_a_gradient(self, device):
        torch.manual_seed(0)
        logits = torch.randn(8, 5, device=device)
        target = torch.rand(8, 5, device=device)
        results = []
        for layer in (nn.CrossEntropyLoss(), QCrossEntropyLoss()):
            a, b = (t.clone().requires_grad_() for t in (logits, target))
            layer(a, b).backward()
            results.append((a.grad, b.grad))
        torch.testing.assert_close(*results)

    def test_what_is_kept(self, device):
        x = torch.randn(2, 21, 96, 96, device=device, requires_grad=True)
        labels = torch.randint(21, (2, 96, 96), device=device)
        with measure_activations(nn.CrossEntropyLoss()) as torch_meter:
            nn.CrossEntropyLoss()(x, labels)
        layer = QCrossEntropyLoss()
        with measure_activations(layer) as meter:
            layer(x, labels)
        assert meter.exact_bytes == torch_meter.saved_bytes
        assert meter.saved_bytes < x.nbytes / 3.8

    def test_convert_and_revert(self):
        model = nn.Sequential(nn.CrossEntropyLoss(label_smoothing=0.1))
        convert_model(model, dict(base='L2', rules={'0': 4}))
        assert type(model[0]) is QCrossEntropyLoss
        assert model[0].quantizer.bits == 4
        convert_model(model, 'L3')
        assert model[0].quantizer.bits == 8
        revert_model(model)
        assert type(model[0]) is nn.CrossEntropyLoss


def make_losses(predictions, target):
    """Of several outputs, one of which reads two predictions, and numbers."""
    first, second = predictions
    return dict(
        both=[(first * second.sigmoid() - target).square().mean()],
        first=F.smooth_l1_loss(first.exp(), target),
        accuracy=(first > 0).float().mean(),
        count=3,
    )


class TestLosses:
    @pytest.fixture
    def tensors(self, device):
        torch.manual_seed(0)
        return torch.randn(3, 4, 50, device=device).unbind()

    def run(self, layer, tensors, function=make_losses):
        *leaves, target = tensors
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        found = layer(function, [x * 1 for x in leaves], target=target)
        (2 * found['both'][0] + 3 * found['first']).backward()
        return found, [x.grad for x in leaves]

    def test_against_torch(self, tensors):
        expected = self.run(Losses(), tensors)
        found = self.run(QLosses(), tensors)
        assert found[0]['count'] == 3
        assert not found[0]['accuracy'].requires_grad
        for key in ('first', 'accuracy'):
            assert_same_bits(found[0][key], expected[0][key])
        for a, b in zip(found[1], expected[1]):
            assert relative_error(a, b) < 1e-6

    def test_what_is_kept(self, tensors):
        *leaves, target = (x.clone().requires_grad_() for x in tensors)
        target = target.detach()
        layer = QLosses()
        with saved_tensors() as saved:
            layer(make_losses, leaves, target)
        # Two gradients of the one loss, one of the other.
        assert sum(t.nbytes for t in saved) == 3 * target.nbytes
        with measure_activations(layer) as meter:
            layer(make_losses, leaves, target)
        with measure_activations(layer) as exact:
            make_losses(leaves, target)
        assert meter.saved_bytes == 3 * target.nbytes
        assert meter.exact_bytes == exact.saved_bytes

    def test_large_gradients_are_codes(self, device, monkeypatch):
        packed = count_packs(monkeypatch)
        torch.manual_seed(0)
        tensors = torch.randn(3, 8, 70000, device=device).unbind()
        found = self.run(seeded(QLosses()), tensors)
        assert len(packed) == 3
        expected = self.run(Losses(), tensors)
        for a, b in zip(found[1], expected[1]):
            assert 1e-4 < relative_error(a, b) < 0.02

    def test_unbiased(self, device):
        torch.manual_seed(0)
        x = torch.randn(2, 140000, device=device)
        layer = seeded(QLosses(bits=2))

        def gradient(layer):
            leaf = x.clone().requires_grad_()
            layer(lambda x: x.exp().square().mean(), leaf).backward()
            return leaf.grad.double()

        exact = gradient(Losses())
        draws = torch.stack([gradient(layer) for _ in range(24)])
        z = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(24))
        z = z[z.isfinite()]
        assert 0.9 < z.square().mean() < 1.3

    @pytest.mark.parametrize(
        'why', ['parameter', 'hook', 'in place', 'float16']
    )
    def test_runs_as_written(self, why, tensors):
        """Where a gradient would be lost, or applied twice."""
        results = []
        for layer in (Losses(), QLosses()):
            leaf = tensors[0].clone().requires_grad_()
            factor = tensors[1].clone().requires_grad_()
            x = leaf * 1
            if why == 'float16':
                x = x.half()
            if why == 'hook':
                x.register_hook(lambda grad: 2 * grad)

            def function(x, factor=factor):
                if why == 'in place':
                    x.mul_(3)
                if why == 'parameter':
                    x = x * factor
                return x.exp().square().sum()

            layer(function, x).backward()
            results.append((leaf.grad, factor.grad))
        for found, expected in zip(results[1], results[0]):
            assert_same_bits(found, expected)

    def test_losses_that_keep_little(self, tensors):
        """One of 200 elements is kept rather than a gradient of all."""
        x, index = tensors[0].requires_grad_(), torch.tensor([3])
        layer = QLosses()
        with measure_activations(layer) as meter:
            loss = layer(
                lambda x: x.view(-1)[index.to(x.device)].square().mean(), x
            )
        assert meter.saved_bytes == meter.exact_bytes < x.nbytes
        loss.backward()
        assert x.grad.count_nonzero() == 1

    def test_small_parts_of_large_gradients(self, device):
        """No gradient of all levels lives on in that of the last one."""
        levels = [
            torch.randn(size, device=device, requires_grad=True)
            for size in ((2, 200000), (2, 100))
        ]
        with saved_tensors() as saved:
            QLosses()(lambda xs: torch.cat(xs, 1).exp().square().sum(), levels)
        assert max(t.untyped_storage().nbytes() for t in saved) < 450000

    def test_results_that_are_no_losses_keep_their_graph(self, tensors):
        results = []
        for layer in (Losses(), QLosses()):
            x = tensors[0].clone().requires_grad_()
            loss, each = layer(lambda x: (x.exp().square().sum(), x.sin()), x)
            (loss + each.sum()).backward()
            results.append(x.grad)
        assert relative_error(results[1], results[0]) < 1e-6

    def test_modified_after_the_loss(self, tensors):
        """As torch says where a loss keeps its graph."""
        weight = tensors[1].clone().requires_grad_()
        x = tensors[0].clone().requires_grad_() * 1
        loss = QLosses()(lambda x: (x * weight).square().sum(), x)
        with torch.no_grad():
            weight.add_(1)
        with pytest.raises(RuntimeError, match='modified'):
            loss.backward()

    def test_in_a_checkpointed_block(self, tensors):
        results = []
        for layer in (Losses(), QLosses()):
            x = tensors[0].clone().requires_grad_()

            def block(x, layer=layer):
                return layer(lambda x: x.exp().square().sum(), x.sin())

            checkpoint(block, x, use_reentrant=False).backward()
            results.append(x.grad)
        assert relative_error(results[1], results[0]) < 1e-6

    @pytest.mark.parametrize('level', ['L0', 'eval', 'no grad'])
    def test_exact(self, level, tensors):
        layer = at_level(QLosses(), 'L0' if level == 'L0' else 'L3')
        layer.train(level != 'eval')
        x = tensors[0].clone().requires_grad_()
        with (
            torch.set_grad_enabled(level != 'no grad'),
            saved_tensors() as saved,
        ):
            layer(lambda x: x.exp().sum(), x)
        # The output of the exponential function, as torch keeps it.
        assert [t.shape for t in saved] == (
            [] if level == 'no grad' else [x.shape]
        )

    def test_twice(self, tensors):
        """retain_graph=True, and gradients that add up."""
        x = tensors[0].clone().requires_grad_()
        loss = QLosses()(lambda x: x.exp().square().sum(), x)
        loss.backward(retain_graph=True)
        first = x.grad.clone()
        loss.backward()
        assert_same_bits(x.grad, 2 * first)

    def test_copies(self):
        layer = QLosses(bits=5)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(twin) is QLosses and twin.quantizer.bits == 5
