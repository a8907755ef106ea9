"""Division of tensors into pieces."""

import pytest
import torch
import torch.utils.checkpoint
from support.pairs import in_turn

import mmactnn
from mmactnn import RoundingGenerator
from mmactnn.codes.payload import WHOLE, pieces
from mmactnn.codes.quantizer import LayerQuantizer

MIB = 2**20


@in_turn(
    share=[0.001, 0.1, 0.3, 0.5, 0.9],
    nbytes=[1000, 12345, 784 * MIB],
    samples=[2, 3, 7, 64, 100, 256],
)
def test_pieces(samples, nbytes, share):
    limit = share * nbytes
    parts = list(pieces(samples, nbytes, limit))
    assert [i for part in parts for i in range(samples)[part]] == list(
        range(samples)
    )
    sizes = [part.stop - part.start for part in parts]
    most = max(1, int(samples * share))
    # As few as there can be, all but the last of one size.
    assert len(parts) == -(-samples // most)
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0] <= most
    if sizes[0] > 1:
        assert sizes[0] * nbytes / samples <= limit * (1 + 1e-9)


def test_no_rest():
    # The first stage of ResNet-50 at batch 256: four quarters.
    parts = list(pieces(256, 784 * MIB, 256 * MIB))
    assert [part.start for part in parts] == [0, 64, 128, 192]


@pytest.mark.parametrize(
    ('samples', 'nbytes', 'limit'),
    [(4, 100, None), (4, 100, 100), (1, 100, 10), (0, 0, 10)],
)
def test_all_in_one(samples, nbytes, limit):
    assert list(pieces(samples, nbytes, limit)) == [WHOLE]


def test_chunks_are_what_was_packed():
    x = torch.randn(7, 3, 5, 5)
    payload = LayerQuantizer(4, 64, RoundingGenerator(seed=1)).pack(x)
    whole = payload.unpack()
    for limit in (None, 1, x.nbytes // 3, x.nbytes):
        parts = [values for _, values in payload.chunks(limit)]
        assert torch.equal(torch.cat(parts), whole)


class TestChannelMeans:
    """Linear layers whose payloads keep the means of channels."""

    LEVEL = dict(base='L3', channel_means=True)

    def make(self, level, dtype=torch.float32, shape=(6, 40, 24)):
        torch.manual_seed(0)
        layer = torch.nn.Linear(shape[-1], 5).to(dtype)
        # Means that are large beside what differs from them.
        x = torch.randn(shape) + 10 * torch.randn(shape[-1])
        mmactnn.convert_model(layer, level)
        return layer, x.to(dtype)

    def payload(self, layer, x):
        output = layer(x)
        context = output.grad_fn
        while not hasattr(context, 'format'):
            context = context.next_functions[0][0]
        return context.format.payload(*context.saved_tensors[1:])

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize('shape', [(6, 40, 24), (48, 24), (2, 3, 5, 24)])
    def test_means_are_exact(self, dtype, shape):
        layer, x = self.make(self.LEVEL, dtype, shape)
        payload = self.payload(layer, x)
        means = x.double().flatten(0, -2).mean(0)
        assert payload.format.kind == 'centred'
        assert payload.means.dtype is torch.float32
        torch.testing.assert_close(payload.means.double(), means)
        found = payload.unpack()
        assert found.dtype is dtype and found.shape == x.shape
        # Codes of 2 bits, in ranges of what differs from the means.
        assert (found - x).abs().max() < 8

    def test_error_is_that_of_the_rest(self):
        layer, x = self.make(self.LEVEL)
        plain, _ = self.make('L3')
        errors = [
            (self.payload(each, x).unpack() - x).square().mean()
            for each in (layer, plain)
        ]
        # Ranges are about six times smaller.
        assert errors[0] < errors[1] / 20

    def test_constant_channels_are_exact(self):
        layer, x = self.make(self.LEVEL)
        x = (x[0, 0] * 8).round().div(8).expand(6, 40, 24).contiguous()
        assert torch.equal(self.payload(layer, x).unpack(), x)

    def test_vector_is_exact(self):
        layer, x = self.make(self.LEVEL)
        payload = self.payload(layer, x[0, 0])
        assert torch.equal(payload.unpack()[0], x[0, 0])

    def test_samples(self):
        layer, x = self.make(self.LEVEL)
        payload = self.payload(layer, x)
        whole = payload.unpack()
        parts = [part for _, part in payload.chunks(2 * x[0].nbytes)]
        assert len(parts) == 3 and torch.equal(torch.cat(parts), whole)
        assert payload.nbytes == sum(t.nbytes for t in payload.tensors)

    def test_gradient_is_unbiased(self):
        layer, x = self.make(self.LEVEL)
        grad = torch.randn(6, 40, 5)
        expected = grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
        draws = torch.stack(
            [
                torch.autograd.grad(layer(x), layer.weight, grad)[0]
                for _ in range(400)
            ]
        ).double()
        z = (draws.mean(0) - expected) / (draws.std(0) / 20)
        assert z.abs().max() < 4.5
        assert z.square().mean() == pytest.approx(1, abs=0.4)

    def test_shared_with_another_linear_layer(self):
        torch.manual_seed(0)
        model = torch.nn.ModuleList(torch.nn.Linear(24, 5) for _ in range(2))
        mmactnn.convert_model(model, self.LEVEL)
        x = torch.randn(6, 40, 24, requires_grad=True) + 3
        first, second = (self.payload(layer, x) for layer in model)
        assert first.means is second.means

    def test_is_not_read_by_a_chain(self):
        """Its op decodes codes alone."""
        layer, x = self.make(self.LEVEL, shape=(2, 8, 6, 24))
        x = x.requires_grad_() * 1
        self.payload(layer, x)
        assert layer.quantizer.cache.get(x) is not None
        assert layer.quantizer.find_shared(x, x) is None

    def test_in_a_checkpointed_block(self):
        layer, x = self.make(self.LEVEL)
        output = torch.utils.checkpoint.checkpoint(
            layer, x.requires_grad_(), use_reentrant=False
        )
        output.sum().backward()
        expected = x.detach().flatten(0, 1).sum(0).expand(5, 24)
        error = (layer.weight.grad - expected).norm() / expected.norm()
        assert error < 0.02

    def test_by_default_there_are_none(self):
        layer, x = self.make('L3')
        assert self.payload(layer, x).format.kind == 'plain'
        with pytest.raises(TypeError, match='channel_means'):
            mmactnn.get_level(dict(base='L3', channel_means=1))
