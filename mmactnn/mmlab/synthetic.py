"""Models from configs of OpenMMLab, and synthetic data for them."""

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

# Objects in an image: COCO has 7 on average.
OBJECTS = 8


def build_task(config, images):
    """Build the model of a config, and a function that computes its loss.

    Images go to the model directly, as from its data preprocessor, with
    random ground truth: neither pretrained weights nor data sets are read.

    Args:
        config (Config): From :func:`load_config`; pretrained weights are
            removed from it.
        images (Tensor[N, 3, H, W]): The batch. For models that take several
            views of an image, the other ones are random.

    Returns:
        tuple[nn.Module, Callable]: The model, in training mode and on the
        device of the images; the function, without arguments.
    """
    scope = config.default_scope
    drop_pretrained(config.model)
    importlib.import_module(f'{scope}.utils').register_all_modules()
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
        model.init_weights()
    # As the runner does in a single process.
    model = revert_sync_batchnorm(model).to(images.device).train()
    samples = make_samples(config, images)
    inputs = images
    views = count_views(config)
    if views:
        others = [torch.randn_like(images) for _ in range(views - 1)]
        inputs = [images, *others]
        # Averages of weights need the length of the training.
        MessageHub.get_current_instance().update_info('max_iters', 1)

    def compute_loss():
        # Not model.loss, since hooks for swapping and compilation run at the
        # call of the model.
        losses = model(inputs, samples, mode='loss')
        return model.parse_losses(losses)[0]

    return model, compute_loss


def load_config(name, options=()):
    """Read a config.

    Args:
        name (str): Its path, or ``package::path`` for one of an installed
            package.
        options (Sequence[str], optional): Overrides ``KEY=VALUE``. Defaults
            to none.

    Returns:
        Config: The config.

    Raises:
        ValueError: If there is no such package or file, or the config is not
            for MMDetection, MMSegmentation or MMPretrain.
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
    if colons:
        config.setdefault('default_scope', package)
    parser = argparse.ArgumentParser()
    parser.add_argument('options', nargs='*', action=DictAction)
    config.merge_from_dict(parser.parse_args(list(options)).options or {})
    scope = config.get('default_scope')
    if scope not in _MAKERS:
        raise ValueError(
            f'default_scope of a config must be one of {", ".join(_MAKERS)}, '
            f'got {scope!r} in {name}'
        )
    return config


def drop_pretrained(config):
    """Remove pretrained weights, so that a model starts from random ones.

    Args:
        config (ConfigDict): Config of the model, changed in place.
    """
    for part in list(_walk(config)):
        if part.get('pretrained') is not None:
            part['pretrained'] = None
        init = part.get('init_cfg')
        init = init if isinstance(init, list) else [init]
        if any(item and item['type'] == 'Pretrained' for item in init):
            part['init_cfg'] = None


def count_classes(config):
    """Number of classes that all heads of a model have.

    Args:
        config (ConfigDict): Config of the model.

    Returns:
        int: The smallest number of classes in the config.

    Raises:
        ValueError: If the config has none.
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


def count_views(config):
    """Number of views of each image that a model learns from.

    Args:
        config (Config): The config.

    Returns:
        int: The number; 0 for models that take single images.
    """
    loader = config.get('train_dataloader') or {}
    for part in _walk(loader.get('dataset')):
        if part.get('type') == 'MultiView':
            views = part['num_views']
            return views if isinstance(views, int) else sum(views)
    return 0


def make_samples(config, images):
    """Random ground truth, one sample for each image.

    Args:
        config (Config): The config, of ``default_scope`` ``'mmdet'``,
            ``'mmseg'`` or ``'mmpretrain'``.
        images (Tensor[N, 3, H, W]): The images.

    Returns:
        list[BaseDataElement]: The samples, on the device of the images.
    """
    generator = torch.Generator().manual_seed(0)
    shape = dict.fromkeys(
        ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'),
        tuple(images.shape[2:]),
    )
    shape['scale_factor'] = (1.0, 1.0)
    if count_views(config):
        make = _make_unlabelled
    else:
        classes = count_classes(config.model)
        make = functools.partial(
            _MAKERS[config.default_scope], config.model, classes
        )
    return [make(shape, generator).to(images.device) for _ in images]


def _make_detection(config, classes, shape, generator):
    from mmdet.structures import DetDataSample

    height, width = shape['img_shape']
    size = torch.tensor([width, height])
    # Boxes from an eighth to a half of the image, within the image.
    extent = size * (0.125 + 0.375 * _uniform((OBJECTS, 2), generator))
    corner = (size - extent) * _uniform((OBJECTS, 2), generator)
    instances = InstanceData(
        bboxes=torch.cat([corner, corner + extent], dim=1),
        labels=torch.randint(classes, (OBJECTS,), generator=generator),
    )
    sample = DetDataSample(metainfo=shape)
    # The preprocessor pads ground truth, too.
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


def _make_unlabelled(shape, generator):
    from mmpretrain.structures import DataSample

    return DataSample(metainfo=shape)


_MAKERS = dict(
    mmdet=_make_detection,
    mmseg=_make_segmentation,
    mmpretrain=_make_classification,
)


def _box_masks(boxes, height, width):
    """Masks that fill their boxes, in the form of data sets."""
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
