"""MMEngine's options of training, with segments and scopes of functions."""

import contextlib
import copy

import pytest
import torch
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.registry import MODELS
from mmseg.models.backbones import VisionTransformer
from support.layers import assert_same_bits
from support.toy import ITERATIONS, make_runner
from support.transformer import Block
from torch import nn

import mmactnn.hooks  # noqa: F401  (registers ActNNHook)
from mmactnn import RoundingGenerator, convert_model, measure_activations

ADAMW = dict(type='AdamW', lr=1e-3, weight_decay=0.05)


def wrapper(**kwargs):
    return dict(
        optim_wrapper=dict(type='OptimWrapper', optimizer=ADAMW) | kwargs
    )


OPTIONS = {
    # One run tells whether options work together; others say which did not.
    'bfloat16 and others': dict(
        hooks=[dict(type='EMAHook', ema_type='ExponentialMovingAverage')],
        **wrapper(
            type='AmpOptimWrapper',
            dtype='bfloat16',
            accumulative_counts=2,
            clip_grad=dict(max_norm=0.1),
            paramwise_cfg=dict(
                norm_decay_mult=0.0,
                custom_keys={'backbone.layers.0': dict(lr_mult=0.1)},
            ),
        ),
    ),
    'checkpointing': dict(
        activation_checkpointing=['backbone.layers.1'], with_cp=False
    ),
    'with_cp': dict(with_cp=True),
}


@MODELS.register_module()
class PatchClassifier(BaseModel):
    """A small ViT of MMSegmentation."""

    def __init__(self, with_cp=False, drop_path_rate=0.2):
        super().__init__()
        self.backbone = VisionTransformer(
            img_size=(16, 16),
            patch_size=2,
            embed_dims=64,
            num_layers=3,
            num_heads=4,
            mlp_ratio=2,
            out_indices=(2,),
            drop_path_rate=drop_path_rate,
            with_cp=with_cp,
        )
        for module in self.modules():
            # MMCV's attention writes rates of one model to its defaults, and
            # QDropout does not draw from torch's generator.
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.head = nn.Linear(64, 4)

    def forward(self, inputs, labels=None, mode='tensor'):
        (features,) = self.backbone(inputs)
        scores = self.head(features.mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, labels))
        return scores


def train(folder, level, hooks=(), stop_at=None, resume=False, **kwargs):
    """Train for an epoch or more; without a level, the plain model.

    Returns:
        tuple: The runner, and the losses by iteration.
    """
    names = ('with_cp', 'drop_path_rate')
    model = {name: kwargs.pop(name) for name in names if name in kwargs}
    hooks = [dict(type='RecordingHook', stop_at=stop_at), *hooks]
    if level is not None:
        hooks.append(dict(type='ActNNHook', level=level, interval=1))
    runner = make_runner(
        folder,
        *hooks,
        model=dict(type='PatchClassifier', **model),
        resume=resume,
        **(wrapper() | kwargs),
    )
    with contextlib.suppress(KeyboardInterrupt):
        runner.train()
    (hook,) = (h for h in runner.hooks if hasattr(h, 'losses'))
    return runner, hook.losses


def saved_mib(runner):
    return runner.message_hub.get_scalar('train/actnn/saved_mib').current()


@pytest.mark.parametrize('name', OPTIONS)
def test_option(name, tmp_path, monkeypatch):
    # The wrapper refuses the CPU, where autocast works all the same.
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available',
        lambda: True,
    )
    option = OPTIONS[name]
    runs = {
        level: train(tmp_path / str(level), level, **copy.deepcopy(option))
        for level in (None, 'L0', 'L3', 'L3R')
    }
    plain, expected = runs[None]
    exact, losses = runs['L0']
    assert losses == expected and len(losses) == ITERATIONS
    for one, other in zip(plain.model.parameters(), exact.model.parameters()):
        assert_same_bits(one, other)
    for level, error in (('L3', 0.05), ('L3R', 0.005)):
        runner, losses = runs[level]
        # The forward pass is exact, and so is the first loss.
        assert losses[0] == expected[0] or name.startswith('bfloat16')
        assert list(losses.values()) == pytest.approx(
            list(expected.values()), abs=error
        )
        weights = [
            torch.cat([p.detach().flatten() for p in r.model.parameters()])
            for r in (plain, runner)
        ]
        assert not torch.equal(*weights)
    kept = [saved_mib(runs[level][0]) for level in ('L0', 'L3', 'L3R')]
    # What is checkpointed by others keeps its input as it is.
    factors = {'checkpointing': (6, 9), 'with_cp': (1, 3)}
    for factor, saved in zip(factors.get(name, (7, 25)), kept[1:]):
        assert factor * saved < kept[0]
    if 'hooks' in option:
        averages = [
            next(h for h in run[0].hooks if hasattr(h, 'ema_model')).ema_model
            for run in (runs[None], runs['L3R'])
        ]
        assert isinstance(averages[1], ExponentialMovingAverage)
        assert list(averages[0].state_dict()) == list(averages[1].state_dict())
        average = averages[1].module.eval()
        x = torch.randn(1, 3, 16, 16)
        assert average(x).isfinite().all()


def test_resumed_run(tmp_path):
    """Rounding of segments depends on the iteration alone."""
    options = dict(epochs=2, drop_path_rate=0.0)
    runner, expected = train(tmp_path / 'whole', 'L3R', **options)
    train(tmp_path / 'killed', 'L3R', stop_at=ITERATIONS, **options)
    resumed, losses = train(tmp_path / 'killed', 'L3R', resume=True, **options)
    assert len(losses) == ITERATIONS
    assert losses == {step: expected[step] for step in losses}
    for one, other in zip(
        runner.model.parameters(), resumed.model.parameters()
    ):
        assert_same_bits(one, other)


def test_compiled_step():
    """As by ``compile`` of a runner, which compiles ``train_step``."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(32) for _ in range(2)])
    generator = RoundingGenerator(seed=1)
    convert_model(model, 'L3R', generator=generator)
    x = torch.randn(2, 16, 32)

    def step(x):
        model.zero_grad()
        model(x).square().mean().backward()

    def gradients(step):
        # A large offset changes with every step.
        found = []
        for index in range(2):
            generator.seek(index << 32)
            with measure_activations(model) as meter:
                step(x)
            grads = [p.grad.flatten() for p in model.parameters()]
            found.append((torch.cat(grads), meter.saved_bytes))
        return found

    expected = gradients(step)
    torch.compiler.reset()
    for one, other in zip(
        gradients(torch.compile(step, backend='eager')), expected
    ):
        # Kernels of attention add up in another order.
        error = (one[0] - other[0]).norm() / other[0].norm()
        assert error < 0.05
        assert one[1] == pytest.approx(other[1], rel=0.1)
