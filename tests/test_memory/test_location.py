"""Places of saved tensors."""

import inspect
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmactnn import convert_model, measure_activations
from mmactnn.memory import Locator


def in_python_module(name, source):
    """Execute code as a Python module of that name."""
    namespace = dict(__name__=name, torch=torch, nn=nn, F=F)
    exec(compile(source, f'/{name}.py', 'exec'), namespace)
    return namespace


LOSSES = in_python_module(
    'toy.models.losses.square',
    """
def square(x):
    return (x + 1).square().mean()

class SquareLoss(nn.Module):
    def forward(self, x):
        return square(x)
""",
)
FOCAL = in_python_module(
    'toy.ops.focal_loss',
    """
def focal(x):
    return x.exp().mean()
""",
)


class OddLoss(LOSSES['SquareLoss']):
    """Not from a package of losses, but its base class is."""


class Head(nn.Module):
    """Methods as those of a detector's head.

    Sums make new tensors: of one that is saved twice, the first place counts.
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.loss_square = LOSSES['SquareLoss']()

    def forward(self, x):
        return self.forward_single(x)

    def forward_single(self, x):
        return torch.tanh(self.layer(x + 1))

    def loss(self, x):
        return self.loss_by_feat(self(x))

    def loss_by_feat(self, x):
        return self.loss_square(x) + sum(map(self.loss_single, [x])) + get(x)

    def loss_single(self, x):
        return helper(x).mean()


class Detector(nn.Module):
    """Methods as those of a detector."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(4, 4), nn.GELU(), nn.Softplus()
        )
        self.head = Head()

    def forward(self, x):
        return self.loss(x)

    def loss(self, x):
        x = self.extract_feat(x)
        return self.head.loss(x)

    def extract_feat(self, x):
        return torch.sigmoid(self.backbone(x))


def helper(x):
    return (x + 1).cos()


def get(x):
    return FOCAL['focal'](x)


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    (number,) = (i for i, line in enumerate(lines) if text in line)
    return f'{Path(__file__).name}:{first + number}'


def saved_at(model, run):
    """Places where something is saved, in their order."""
    with measure_activations(model, Locator(model)) as meter:
        output = run()
    del output
    return [place for place, _ in meter.by_place()]


@pytest.fixture(scope='module')
def places():
    """Places where a detector saves tensors, as strings."""
    model = Detector()
    x = torch.randn(2, 4)
    found = saved_at(model, lambda: model(x))
    return {(p.module, p.source and str(p.source), p.loss) for p in found}


@pytest.mark.parametrize(
    'place',
    [
        # Layers of torch.
        ('backbone.0', None, False),
        ('backbone.1', None, False),
        ('head.layer', None, False),
        # Functions that a module's methods call.
        ('', line_of(Detector.extract_feat, 'sigmoid'), False),
        ('head', line_of(Head.forward_single, 'tanh'), False),
        # A helper tells its own line; the head's method is a loss's.
        ('head', line_of(helper, 'cos'), True),
        # Code of packages of losses, whoever calls it.
        ('head.loss_square', 'toy.models.losses.square.py:3', True),
        ('head', 'toy.ops.focal_loss.py:3', True),
    ],
    ids=str,
)
def test_place(place, places):
    assert place in places


def test_nothing_but_losses_is_a_loss(places):
    named = {p[0] for p in places if p[2]}
    assert named == {'head', 'head.loss_square'}


def test_subclass_of_a_loss():
    model = nn.Sequential(OddLoss())
    x = torch.randn(2, requires_grad=True)
    assert {p.loss for p in saved_at(model, lambda: model(x))} == {True}


@pytest.mark.parametrize(
    'loss',
    [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        F.smooth_l1_loss,
        F.binary_cross_entropy_with_logits,
    ],
    ids=lambda loss: getattr(loss, '__name__', 'module'),
)
def test_losses_of_torch_inside_of_a_forward_pass(loss):
    class Model(nn.Module):
        def forward(self, x):
            return loss(x.exp(), torch.full_like(x, 0.5))

    model = Model()
    x = torch.randn(2, 3, requires_grad=True)
    places = saved_at(model, lambda: model(x))
    # The exponential, and whatever the loss saves.
    assert not places[0].loss
    assert {p.loss for p in places[1:]} == {True}


def test_outside_of_the_model():
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.randn(2, 2)
    (*inside, outside) = saved_at(model, lambda: model(x).exp())
    assert {p.module for p in inside} == {'0'}
    assert outside.module is None and outside.loss
    assert outside.source.text.startswith('(*inside, outside)')


def test_compressed_and_fused_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    report = convert_model(model, 'L3')
    assert report.fused
    x = torch.randn(2, 3, 8, 8)
    places = saved_at(model, lambda: model(x))
    assert {p.module for p in places} == {'0', '1'}
    assert {p.source for p in places} == {None}


def test_recomputed_blocks():
    """Tensors of a checkpoint belong to a call of the module around it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(
                self.inner, x, use_reentrant=True
            )

    model = Model()
    x = torch.randn(2, 2, requires_grad=True)
    (place,) = saved_at(model, lambda: model(x))
    assert place.module == ''
    assert place.source.text.startswith('return torch.utils.checkpoint')


def test_no_variable_is_held():
    """Looking at the variables of a frame does not keep them alive."""
    freed = []

    class Model(nn.Module):
        def forward(self, x):
            y = x.detach() + 1
            z = x.exp()  # is saved while there is a y
            gone = weakref.ref(y)
            y = None
            freed.append(gone() is None)
            return z

    model = Model()
    x = torch.randn(2, requires_grad=True)
    saved_at(model, lambda: model(x))
    assert freed == [True]
