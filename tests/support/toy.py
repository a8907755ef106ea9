"""A runner with a small model, for the tests of the hook."""

import itertools

import torch
from mmcv.cnn import ConvModule
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

SAMPLES, BATCH = 12, 4
ITERATIONS = SAMPLES // BATCH  # of an epoch

_count = itertools.count()


@MODELS.register_module()
class ToyClassifier(BaseModel):
    """Some layers come from the config, others no config can name."""

    def __init__(self, conv_cfg=None, norm_cfg=None, act_cfg=None, **kwargs):
        super().__init__(
            init_cfg=dict(type='Kaiming', layer='Conv2d'),
        )
        norm_cfg = norm_cfg or dict(type='BN')
        act_cfg = act_cfg or dict(type='ReLU')
        self.body = nn.Sequential(
            ConvModule(
                3,
                8,
                3,
                conv_cfg=conv_cfg,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg,
                **kwargs,
            ),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(inplace=True),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, inputs, labels=None, mode='tensor'):
        scores = self.head(self.body(inputs).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, labels))
        return scores if mode == 'tensor' else list(scores.unbind())


@DATASETS.register_module()
class ToyDataset(Dataset):
    """Random images whose class is their brightest channel, or none."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(SAMPLES, 3, 16, 16, generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        image = self.images[index]
        means = image.mean((1, 2))
        label = int(means.argmax()) if means.max() > 0 else 3
        return dict(inputs=image, labels=torch.tensor(label))


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """The mean score."""

    def process(self, data_batch, data_samples):
        self.results += [float(sample.mean()) for sample in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


@HOOKS.register_module()
class RecordingHook(Hook):
    """Remembers every loss, and stops the run if told to.

    Args:
        stop_at (int, optional): Iteration that raises. Defaults to none.
    """

    priority = 'LOWEST'

    def __init__(self, stop_at=None):
        self.losses = {}
        self.stop_at = stop_at

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        if runner.iter == self.stop_at:
            raise KeyboardInterrupt
        self.losses[runner.iter] = outputs['loss'].item()


def dataloader(shuffle):
    return dict(
        batch_size=BATCH,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=shuffle),
        dataset=dict(type='ToyDataset'),
        collate_fn=dict(type='default_collate'),
    )


def make_config(
    work_dir,
    *custom_hooks,
    model=None,
    epochs=1,
    by_epoch=True,
    evaluates=False,
    trains=True,
    **kwargs,
):
    """The config of a runner.

    Args:
        work_dir (Path): Where it writes.
        *custom_hooks (dict): ``ActNNHook`` and others.
        model (dict, optional): Arguments of :class:`ToyClassifier`.
        epochs (int, optional): Epochs to train. Defaults to 1.
        by_epoch (bool, optional): Count epochs rather than as many
            iterations. Defaults to True.
        evaluates (bool, optional): With a validation and a test loop.
            Defaults to False.
        trains (bool, optional): With a training loop. Defaults to True.
        **kwargs: For the runner.

    Returns:
        dict: The config.
    """
    interval = 1 if by_epoch else ITERATIONS
    loops = {}
    if trains:
        loops.update(
            train_dataloader=dataloader(shuffle=True),
            train_cfg=dict(by_epoch=True, max_epochs=epochs)
            if by_epoch
            else dict(by_epoch=False, max_iters=epochs * ITERATIONS),
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='SGD', lr=0.1, momentum=0.9),
            ),
        )
    if evaluates:
        for phase in ('val', 'test'):
            loops.update(
                {
                    f'{phase}_dataloader': dataloader(shuffle=False),
                    f'{phase}_cfg': dict(),
                    f'{phase}_evaluator': dict(type='ToyMetric'),
                }
            )
    cfg = dict(
        model=dict(dict(type='ToyClassifier'), **(model or {})),
        work_dir=str(work_dir),
        default_scope='mmengine',
        experiment_name=f'toy{next(_count)}',
        randomness=dict(seed=5),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=2),
            checkpoint=dict(
                type='CheckpointHook', interval=interval, by_epoch=by_epoch
            ),
        ),
        custom_hooks=list(custom_hooks),
        **loops,
    )
    cfg.update(kwargs)
    return cfg


def make_runner(*args, **kwargs):
    """Build a runner.

    Args:
        *args: As :func:`make_config`.
        **kwargs: As :func:`make_config`.

    Returns:
        Runner: The runner.
    """
    return Runner.from_cfg(make_config(*args, **kwargs))
