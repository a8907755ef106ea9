"""Division of tensors into pieces."""

import pytest
import torch
from support.pairs import in_turn

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
