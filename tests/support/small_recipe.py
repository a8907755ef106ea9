"""Shipped recipes as they are, but for a few small images and a CPU."""

import contextlib
import importlib
import math

import pytest
import yaml
from mmdet.datasets import CocoDataset

from mmactnn.mmlab.synthetic import drop_pretrained

from .digits import make_digits
from .tools import ROOT, load_tool
from .torchvision_stub import make_torchvision_importable

CONFIGS = ROOT / 'configs' / 'actnn'
ITERATIONS, BATCH = 2, 2

# Few boxes, few negatives to contrast with, and few layers of a kind. No score
# is too low, because a model that has hardly been trained would be evaluated
# on none. No epoch is the last, in which YOLOX would have another loss.
_CAPS = dict(
    num=32,
    nms_pre=50,
    max_per_img=20,
    score_thr=0,
    num_last_epochs=-1,
    queue_len=8 * BATCH,
    num_layers=2,
    num_modules=1,
    num_blocks=1,
)
# Blocks of a ResNet-50's stages: two in a row where one is as good elsewhere.
_STAGES = (1, 2, 1, 1)
# Images of detectors, whose ratios of sizes matter: 640 pixels and 800
# become 96.
_SCALE = 0.12
# Side of all other images, in pixels; and from where on they are made small.
_SIZE, _LARGE = 64, 100
# Channels, of which there are a quarter; not those of images. Factors of
# widths, which count the same; and what stages of ResNets start with.
_CHANNELS = {
    'c1_channels',
    'c1_in_channels',
    'channels',
    'conv_out_channels',
    'fc_out_channels',
    'feat_channels',
    'feat_dim',
    'hid_channels',
    'in_channels',
    'num_channels',
    'out_channels',
    'widen_factor',
}
_NARROWER, _FEWEST = 4, 32
_STEM = ('base_channels', 'stem_channels')

_train = load_tool('train.py')


# Among recipes of one method that differ in depth, data or schedule, the
# smallest is trained; test_configs.py builds the others, which --full
# trains. So it is with what is a part of another one: Mask R-CNN has all of
# Faster R-CNN, as many times as Cascade R-CNN, UPerNet the pooling of PSPNet,
# FCOS the towers of ATSS, RTMDet the blocks of YOLOX, MoCo the neck and the
# loss of SimCLR, and others have the head of FCN. test_linear_probe.py runs
# the probe by the tools.
ALIKE = {
    'atss_r50',
    'cascade_rcnn_r50',
    'faster_rcnn_r50',
    'faster_rcnn_r50_bccd',
    'faster_rcnn_r50_paper',
    'fcn_r18_digits',
    'fcn_r50',
    'fcn_r50_paper',
    'linear_probe_r18_digits',
    'mocov2_r50',
    'mocov2_r50_paper',
    'pspnet_r50',
    'resnet18_cifar10',
    'resnet50_cifar10',
    'retinanet_r101',
    'retinanet_r50',
    'retinanet_r50_bccd',
    'retinanet_r50_paper',
    'retinanet_x101_64x4d',
    'sem_fpn_r50',
    'sem_fpn_r50_paper',
    'simclr_r50',
    'yolox_s',
}


def list_recipes(metafile):
    """The recipes that a metafile names.

    Args:
        metafile (str): Its name in ``configs/actnn/``.

    Returns:
        list[str]: Their names.
    """
    return [model['Name'] for model in _read_models(metafile)]


def list_detectors(stages):
    """The recipes of detectors of one kind.

    Args:
        stages (int): 2 for those that have a region proposal network, 1 for
            those that have none.

    Returns:
        list[str]: Their names.
    """
    return [
        model['Name']
        for model in _read_models('metafile.yml')
        if ('RPN' in model['Metadata']['Architecture']) == (stages == 2)
    ]


def _read_models(metafile):
    return yaml.safe_load((CONFIGS / metafile).read_text())['Models']


def make_data(toolbox, folder):
    """Make images that :func:`shrink` lets recipes read.

    Args:
        toolbox (str): Whose recipes: ``'mmdet'``, ``'mmseg'`` or
            ``'mmpretrain'``.
        folder (Path): Where to.
    """
    layouts = dict(mmdet='coco', mmseg='digits', mmpretrain='classes')
    make_digits(
        folder,
        layout=layouts[toolbox],
        num_train=ITERATIONS * BATCH,
        num_val=BATCH,
        image_size=_side(800, toolbox),
    )


@contextlib.contextmanager
def shallow_resnets(toolbox):
    """Build ResNets of 50 layers with fewer of them, as a context.

    Args:
        toolbox (str): See :func:`make_data`.
    """
    resnet = importlib.import_module(f'{toolbox}.models.backbones.resnet')
    settings = resnet.ResNet.arch_settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings, 50, (settings[50][0], _STAGES))
        yield


def load_recipe(name):
    """Read a recipe as the tools do.

    Args:
        name (str): Its name.

    Returns:
        Config: The config; what it needs of its toolbox can be imported.
    """
    path = CONFIGS / f'{name}.py'
    prepare_imports(name)
    return _train.build_config(_train.parse_args([str(path)]))


def prepare_imports(name):
    """Make importable what a recipe needs, some of it when it is read.

    Args:
        name (str): Its name.
    """
    if 'mmpretrain' in (CONFIGS / f'{name}.py').read_text():
        # First what would import MMPretrain if it could.
        importlib.import_module('mmdet.models')
        make_torchvision_importable()


def shrink(config, data, work_dir):
    """Let a recipe run for two iterations and an evaluation.

    Args:
        config (Config): From :func:`load_recipe`; changed in place.
        data (Path): Folder of :func:`make_data`.
        work_dir (Path): Where the run writes to.

    Returns:
        Config: ``config``.
    """
    toolbox = config.default_scope
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        if loader is None:
            continue
        loader.update(
            batch_size=BATCH, num_workers=0, persistent_workers=False
        )
        folder = 'train' if split == 'train' else 'val'
        read = _READ[toolbox]
        loader.dataset = read(_small(loader.dataset, toolbox), data, folder)
    for evaluator in ('val_evaluator', 'test_evaluator'):
        if 'ann_file' in (config.get(evaluator) or ()):
            config[evaluator].ann_file = str(data / _annotations('val'))
    config.model = shrink_model(config.model, toolbox)
    config.custom_hooks = _small(config.custom_hooks, toolbox)
    _shorten(config)
    config.work_dir = str(work_dir)
    # MMEngine keeps objects of all runs by this name.
    config.experiment_name = work_dir.name
    config.log_level = 'ERROR'
    config.randomness = dict(seed=0)
    return config


def shrink_model(model, toolbox):
    """Let a model take small images, without pretrained weights.

    Args:
        model (ConfigDict): Its config.
        toolbox (str): See :func:`make_data`.

    Returns:
        ConfigDict: A copy, changed.
    """
    model = _small(model, toolbox)
    # Attention keeps as much at any width: it would outweigh all else. And
    # some are narrow as they are.
    narrow = model.backbone.get('base_channels', 64) < 64
    if model.type != 'DETR' and not narrow:
        model = _narrow(model)
    drop_pretrained(model)
    return model


def _narrow(node, name=None):
    """A copy of a part of a model's config, of fewer channels."""
    if isinstance(node, dict):
        found = type(node)({key: _narrow(node[key], key) for key in node})
        if 'ResN' in str(node.get('type')) and 'depth' in node:
            found.update(dict.fromkeys(_STEM, 64 // _NARROWER))
        return found
    if isinstance(node, (list, tuple)):
        return type(node)(_narrow(item, name) for item in node)
    if name not in _CHANNELS or not isinstance(node, (int, float)):
        return node
    if name == 'widen_factor':
        return node / _NARROWER
    return node // _NARROWER if node >= _FEWEST else node


def _shorten(config):
    """Let a run end, be evaluated and saved after a few iterations."""
    config.train_cfg.pop('dynamic_intervals', None)
    by_epoch = config.train_cfg.get('type') != 'IterBasedTrainLoop'
    if by_epoch:
        interval = 1
        config.train_cfg.update(max_epochs=1, val_interval=1)
    else:
        interval = ITERATIONS
        config.train_cfg.update(max_iters=interval, val_interval=interval)
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook',
        by_epoch=by_epoch,
        interval=interval,
        save_optimizer=False,
    )


def _read_detection(dataset, data, split):
    inner = dataset
    while 'dataset' in inner:
        inner = inner.dataset
    inner.data_root = f'{data}/'
    inner.ann_file = _annotations(split)
    inner.data_prefix = dict(img=f'{split}2017/')
    inner.pop('filter_cfg', None)  # no image of the few is left out
    if 'metainfo' in inner:
        # As many categories, by the names of COCO.
        names = CocoDataset.METAINFO['classes']
        inner.metainfo = dict(classes=names[: len(inner.metainfo.classes)])
    return dataset


def _annotations(split):
    return f'annotations/instances_{split}2017.json'


def _read_segmentation(dataset, data, split):
    return dict(
        type='BaseSegDataset',
        data_root=str(data),
        img_suffix='.png',
        data_prefix=dict(img_path=split, seg_map_path=f'seg/{split}'),
        metainfo=dict(classes=('ground', *map(str, range(10)))),
        pipeline=dataset.pipeline,
    )


def _read_classes(dataset, data, split):
    pipeline = dataset.pipeline
    if pipeline[0].type != 'LoadImageFromFile':
        # Images of the data set lie in memory.
        pipeline.insert(0, dict(type='LoadImageFromFile'))
    return dict(
        type='CustomDataset',
        data_root=str(data),
        data_prefix=split,
        with_label=dataset.get('with_label', True),
        pipeline=pipeline,
    )


_READ = dict(
    mmdet=_read_detection,
    mmseg=_read_segmentation,
    mmpretrain=_read_classes,
)


def _small(node, toolbox, name=None):
    """A copy of a part of a config, with small images and few boxes."""
    if isinstance(node, dict):
        return type(node)(
            {key: _small(node[key], toolbox, key) for key in node}
        )
    if _is_size(node):
        sides = (_side(pixels, toolbox) for pixels in node)
        return type(node)(sides)
    if isinstance(node, (list, tuple)):
        return type(node)(_small(item, toolbox, name) for item in node)
    if isinstance(node, (int, float)) and name in _CAPS:
        return min(node, _CAPS[name])
    if isinstance(node, int) and name == 'scale' and node >= _LARGE:
        return _side(node, toolbox)
    return node


def _is_size(node):
    """Whether a value is width and height of large images."""
    return (
        isinstance(node, (list, tuple))
        and len(node) == 2
        and all(isinstance(n, int) and abs(n) >= _LARGE for n in node)
    )


def _side(pixels, toolbox):
    """Reduced side of an image, a multiple of 32 for strides."""
    if toolbox != 'mmdet':
        return _SIZE
    size = 32 * math.ceil(abs(pixels) * _SCALE / 32)
    return size if pixels > 0 else -size
