"""Models that configs of OpenMMLab describe, and synthetic data for them."""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

from .models import Task, make_images, place

# Objects in an image: COCO has 7 on average.
OBJECTS = 8


def build_config_task(trial):
    """Build the model of a config, and a batch it can train on.

    The batch goes to the model directly, as its data preprocessor would hand
    it over: neither pretrained weights nor data sets are read.

    Args:
        trial (Trial): Its model is a config.

    Returns:
        Task: The task.

    Raises:
        ValueError: If there is no such config, or it is of another package.
    """
    config = load_config(trial.model, trial.cfg_options)
    scope = config.get('default_scope') or trial.model.partition('::')[0]
    if scope not in _MAKERS:
        raise ValueError(
            f'default_scope of a config must be one of {", ".join(_MAKERS)}, '
            f'got {scope!r} in {trial.model}'
        )
    drop_pretrained(config.model)
    importlib.import_module(f'{scope}.utils').register_all_modules()
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
        model.init_weights()
    # As the runner does where there is one process.
    model = place(revert_sync_batchnorm(model), trial).train()
    images = make_images(trial)
    samples = make_samples(scope, config.model, trial)

    def compute_loss():
        # Not model.loss: swapping and compilation begin at the call.
        losses = model(images, samples, mode='loss')
        return model.parse_losses(losses)[0]

    return Task(model, compute_loss)


def load_config(name, options=()):
    """Read a config.

    Args:
        name (str): Its path, or ``package::path`` for one that an installed
            package brings along.
        options (Sequence[str], optional): Overrides ``KEY=VALUE``. Defaults
            to none.

    Returns:
        Config: The config.

    Raises:
        ValueError: If there is no such package or file.
    """
    path = Path(name)
    package, colons, inside = name.partition('::')
    if colons:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ValueError(f'{package!r} of {name!r} is not installed')
        path = Path(spec.origin).parent / '.mim' / 'configs' / inside
    if not path.is_file():
        raise ValueError(f'a model must name a config, but {path} is no file')
    config = Config.fromfile(path)
    parser = argparse.ArgumentParser()
    parser.add_argument('options', nargs='*', action=DictAction)
    config.merge_from_dict(parser.parse_args(list(options)).options or {})
    return config


def drop_pretrained(config):
    """Let a model start from random weights.

    Args:
        config (ConfigDict): Of the model, changed in place.
    """
    for part in list(_walk(config)):
        if part.get('pretrained') is not None:
            part['pretrained'] = None
        init = part.get('init_cfg')
        init = init if isinstance(init, list) else [init]
        if any(item and item['type'] == 'Pretrained' for item in init):
            part['init_cfg'] = None


def count_classes(config):
    """How many classes every head of a model knows.

    Args:
        config (ConfigDict): Of the model.

    Returns:
        int: The least number that any part of it names.

    Raises:
        ValueError: If none does.
    """
    keys = ('num_classes', 'num_things_classes')
    counts = [
        part[key]
        for part in _walk(config)
        for key in keys
        if isinstance(part.get(key), int)
    ]
    if not counts:
        raise ValueError(
            'the config of a model must say num_classes somewhere, got '
            f'{config.get("type")} without'
        )
    return min(counts)


def make_samples(scope, config, trial):
    """Random ground truth, one sample for each image.

    Args:
        scope (str): ``'mmdet'``, ``'mmseg'`` or ``'mmpretrain'``.
        config (ConfigDict): Of the model.
        trial (Trial): Says how many, how large, and where.

    Returns:
        list[BaseDataElement]: The samples.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = trial.image_size
    shape = dict.fromkeys(
        ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'),
        (height, width),
    )
    shape['scale_factor'] = (1.0, 1.0)
    make = functools.partial(_MAKERS[scope], config, count_classes(config))
    return [
        make(shape, generator).to(trial.device)
        for _ in range(trial.batch_size)
    ]


def _make_detection(config, classes, shape, generator):
    from mmdet.structures import DetDataSample

    height, width = shape['img_shape']
    size = torch.tensor([width, height])
    # Anything between an eighth and a half of the image, wholly inside.
    extent = size * (0.125 + 0.375 * _uniform((OBJECTS, 2), generator))
    corner = (size - extent) * _uniform((OBJECTS, 2), generator)
    instances = InstanceData(
        bboxes=torch.cat([corner, corner + extent], dim=1),
        labels=torch.randint(classes, (OBJECTS,), generator=generator),
    )
    sample = DetDataSample(metainfo=shape)
    # The preprocessor pads what the heads learn from.
    padded = config.get('data_preprocessor') or {}
    if padded.get('pad_mask'):
        instances.masks = _box_masks(instances.bboxes, height, width)
    if padded.get('pad_seg'):
        labels = _label_map(classes, shape, generator)
        sample.gt_sem_seg = PixelData(sem_seg=labels)
    sample.gt_instances = instances
    return sample


def _make_segmentation(config, classes, shape, generator):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=shape)
    labels = _label_map(classes, shape, generator)
    sample.gt_sem_seg = PixelData(data=labels)
    return sample


def _make_classification(config, classes, shape, generator):
    from mmpretrain.structures import DataSample

    label = torch.randint(classes, (1,), generator=generator)
    return DataSample(metainfo=shape).set_gt_label(label)


_MAKERS = dict(
    mmdet=_make_detection,
    mmseg=_make_segmentation,
    mmpretrain=_make_classification,
)


def _box_masks(boxes, height, width):
    """Masks that fill their boxes, as data sets' are stored."""
    from mmdet.structures.mask import BitmapMasks

    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long()):
        mask[top:bottom, left:right] = 1
    return BitmapMasks(masks.numpy(), height, width)


def _label_map(classes, shape, generator):
    size = (1, *shape['img_shape'])
    return torch.randint(classes, size, generator=generator)


def _uniform(size, generator):
    return torch.rand(size, generator=generator)


def _walk(config) -> Iterator[dict]:
    """Yield every dict of a nested config."""
    if isinstance(config, dict):
        yield config
        config = config.values()
    elif not isinstance(config, (list, tuple)):
        return
    for part in config:
        yield from _walk(part)
