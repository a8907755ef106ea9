"""MMEngine's ``activation_checkpointing`` around fused blocks."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import turn_on_activation_checkpointing
from support.blocks import BLOCKS
from support.layers import assert_same_bits
from support.toy import make_runner
from torch import nn

from mmactnn import (
    RoundingGenerator,
    convert_model,
    measure_activations,
    revert_model,
)
from mmactnn.hooks import ActNNHook

CHECKPOINTED = ['basic', 'tail']
RUNS = 36


@MODELS.register_module()
class BlockClassifier(BaseModel):
    """Blocks that are fused, two of which shall be checkpointed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.basic = BLOCKS['mmdet basic'][0]()
        self.conv = BLOCKS['ConvModule'][0]()
        self.tail = BLOCKS['Sequential'][0]()
        self.head = nn.Linear(8, 4)

    def forward(self, inputs, labels=None, mode='tensor'):
        x = self.tail(self.conv(self.basic(self.stem(inputs))))
        scores = self.head(x.mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, labels))
        return scores


@pytest.mark.parametrize('level', [None, 'L0', 'L3'])
def test_training(level, tmp_path):
    """Without a level, the model of plain layers."""

    def train(name, **kwargs):
        hooks = [dict(type='RecordingHook')]
        if level is not None:
            hooks.append(dict(type=ActNNHook.__name__, level=level))
        runner = make_runner(tmp_path / name, *hooks, epochs=2, **kwargs)
        runner.model = BlockClassifier()
        runner.model.load_state_dict(start)
        runner.train()
        (hook,) = (h for h in runner.hooks if hasattr(h, 'losses'))
        return runner, hook.losses

    torch.manual_seed(0)
    start = BlockClassifier().state_dict()
    plain, expected = train('plain')
    checkpointed, losses = train(
        'checkpointed', activation_checkpointing=CHECKPOINTED
    )
    if level == 'L3':
        # Rounded in another order, and what is rounded once less.
        assert losses == pytest.approx(expected, rel=0.1)
        assert losses != expected
    else:
        assert losses == expected
        for one, other in zip(
            plain.model.parameters(), checkpointed.model.parameters()
        ):
            assert_same_bits(one, other)
    if level is not None:
        saved = [
            runner.message_hub.get_scalar('train/actnn/saved_mib').current()
            for runner in (plain, checkpointed)
        ]
        assert saved[0] != saved[1]


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_are_unbiased():
    model = BlockClassifier()
    x = torch.randn(4, 3, 10, 10)
    exact = gradients(model, x)
    report = convert_model(model, 'L3', generator=RoundingGenerator(seed=1))
    # The model itself runs its parts.
    assert {item.name for item in report.fused} == {
        '',
        *('basic', 'conv', 'tail'),
    }
    turn_on_activation_checkpointing(model, CHECKPOINTED)
    found = torch.stack([gradients(model, x) for _ in range(RUNS)])
    errors = (found - exact).norm(dim=1)
    assert (errors > 0).all()
    # The error of the mean of 36 is a sixth of one's.
    error = (found.mean(0) - exact).norm()
    assert error < 1.5 * errors.square().mean().sqrt() / RUNS**0.5


@pytest.mark.parametrize('level', ['L0', 'L3'])
def test_conversion_leaves_it_on(level):
    plain, model = BlockClassifier(), BlockClassifier()
    plain.load_state_dict(model.state_dict())
    for wrapped in (plain, model):
        turn_on_activation_checkpointing(wrapped, CHECKPOINTED)
    before = {name: getattr(model, name).forward for name in CHECKPOINTED}
    report = convert_model(model, level)
    assert {item.name for item in report.fused} <= {'conv'}
    for name, forward in before.items():
        assert getattr(model, name).forward is forward
    x = torch.randn(4, 3, 10, 10)
    exact, found = gradients(plain, x), gradients(model, x)
    if level == 'L0':
        assert_same_bits(found, exact)
    with measure_activations(model) as meter:
        model(x)
    with measure_activations(plain) as expected:
        plain(x)
    assert found.isfinite().all()
    assert meter.exact_bytes == expected.exact_bytes


def test_later_conversions_and_reversal():
    model = BlockClassifier()
    x = torch.randn(4, 3, 10, 10)
    exact = gradients(model, x)
    convert_model(model, 'L3')
    turn_on_activation_checkpointing(model, CHECKPOINTED)
    coded = gradients(model, x)
    convert_model(model, 'L0')
    assert_same_bits(gradients(model, x), exact)
    convert_model(model, 'L3')
    again = gradients(model, x)
    for found in (coded, again):
        assert not torch.equal(found, exact)
        assert (found - exact).norm() < exact.norm()
    revert_model(model)
    assert_same_bits(gradients(model, x), exact)
