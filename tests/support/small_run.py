"""Runs a recipe as it is, but for a few small images and a CPU."""

import copy
import dataclasses
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmactnn import measure_activations

from .saved_places import SavedPlaces, saved_places

ITERATIONS, BATCH = 3, 2
IMAGE_SIZE = 96

# Of images: 640 pixels and 800 become 96.
_SCALE = 0.12
_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# Few boxes. No score is too low, because a model that has hardly been trained
# would be evaluated on none. No epoch is the last, in which YOLOX would have
# another loss.
_CAPS = dict(
    num=32, nms_pre=50, max_per_img=20, score_thr=0, num_last_epochs=-1
)


def shrink(config, work_dir):
    """Let a detection recipe run three iterations on COCO in ``data/coco``.

    Args:
        config (Config): The recipe; changed in place.
        work_dir (Path): Where the run writes to.

    Returns:
        Config: ``config``.
    """
    for key in _LOADERS:
        loader = config[key]
        loader.batch_size = BATCH if key.startswith('train') else 1
        loader.update(num_workers=0, persistent_workers=False)
        split = 'train' if key.startswith('train') else 'val'
        _use_coco(loader.dataset, split)
    for key in ('val_evaluator', 'test_evaluator'):
        config[key].ann_file = 'data/coco/annotations/instances_val2017.json'
    for part in ('model', 'custom_hooks', *_LOADERS):
        config[part] = _small(config[part])
    config.train_cfg.update(max_epochs=1, val_interval=1)
    config.train_cfg.pop('dynamic_intervals', None)
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.update(interval=1, save_optimizer=False)
    config.work_dir = str(work_dir)
    # MMEngine keeps objects of all runs by this name.
    config.experiment_name = work_dir.name
    config.log_level = 'ERROR'
    config.randomness = dict(seed=0)
    return config


def _use_coco(dataset, split):
    """Let a dataset, or the one that it wraps, read the small COCO."""
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.data_root = 'data/coco/'
    dataset.ann_file = f'annotations/instances_{split}2017.json'
    dataset.data_prefix = dict(img=f'{split}2017/')
    dataset.pop('filter_cfg', None)  # no image of the few is left out
    if 'metainfo' in dataset:
        # As many categories, by the names of COCO.
        names = CocoDataset.METAINFO['classes']
        dataset.metainfo = dict(classes=names[: len(dataset.metainfo.classes)])


def _small(node):
    """With small images, few boxes and no pretrained weights."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in _CAPS and isinstance(value, (int, float)):
                node[key] = min(value, _CAPS[key])
            elif key == 'init_cfg' and _is_pretrained(value):
                node[key] = None
            else:
                node[key] = _small(value)
        return node
    if isinstance(node, (list, tuple)):
        sizes = len(node) == 2 and all(
            isinstance(n, int) and abs(n) >= 100 for n in node
        )
        return type(node)(_scaled(n) if sizes else _small(n) for n in node)
    return node


def _is_pretrained(init_cfg):
    return isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained'


def _scaled(pixels):
    """In multiples of 32, which strides divide."""
    size = 32 * math.ceil(abs(pixels) * _SCALE / 32)
    return size if pixels > 0 else -size


@dataclasses.dataclass
class SmallRun:
    """A recipe that ran, and models to compare with.

    Attributes:
        config (Config): What ran.
        model (nn.Module): The model that was trained.
        scalars (dict[str, list[float]]): All that was logged, by key.
        checkpoint (dict): What was saved at the end.
        batch (dict): A batch of training data.
    """

    config: Config
    model: nn.Module
    scalars: dict
    checkpoint: dict
    batch: dict

    def build(self, model_config):
        """Build a model as the runner would in one process.

        Args:
            model_config (ConfigDict): Its config.

        Returns:
            nn.Module: In training mode.
        """
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(_small(copy.deepcopy(model_config)))
        return revert_sync_batchnorm(model).train()

    def loss(self, model):
        """The loss of the batch, all random numbers being those of a seed.

        Args:
            model (nn.Module): The model.

        Returns:
            Tensor: Scalar.
        """
        model.train()
        torch.manual_seed(0)
        np.random.seed(0)
        data = model.data_preprocessor(copy.deepcopy(self.batch), True)
        return model.parse_losses(model(**data, mode='loss'))[0]

    def measure(self, model):
        """What a model keeps of the batch.

        Args:
            model (nn.Module): The model.

        Returns:
            ActivationMeter: Its reading.
        """
        with measure_activations(model) as meter:
            self.loss(model)
        return meter

    def places(self, model) -> SavedPlaces:
        """Where a model saves what it keeps of the batch.

        Args:
            model (nn.Module): The model.

        Returns:
            SavedPlaces: Bytes by places.
        """
        with saved_places(model) as places:
            self.loss(model)
        return places


def run_recipe(path, home):
    """Train, evaluate and save a recipe.

    Args:
        path (Path): The config.
        home (Path): Directory that holds the small COCO in ``data/coco``.

    Returns:
        SmallRun: What came out.
    """
    work_dir = Path(home) / 'work_dirs' / path.stem
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(DefaultScope, '_instance_dict', OrderedDict())
        # Goes into files and is formatted for each of them, which would take
        # longer than the training.
        patch.setattr(Config, 'pretty_text', '')
        config = shrink(Config.fromfile(path), work_dir)
        runner = Runner.from_cfg(config)
        runner.train()
        batch = next(iter(runner.train_dataloader))
    scalars = {
        key: [float(value) for value in buffer.data[0]]
        for key, buffer in runner.message_hub.log_scalars.items()
    }
    checkpoint = torch.load(
        work_dir / 'epoch_1.pth', map_location='cpu', weights_only=False
    )
    return SmallRun(config, runner.model, scalars, checkpoint, batch)
