"""Random ground truth, in the form that a config's pipeline loads it."""

import functools
import inspect

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from mmengine.structures import InstanceData, PixelData

from .parts import parts_of

# Objects in an image: COCO has 7 on average.
OBJECTS = 8

# Proposals of an image where a model takes them from a file: as many as an
# RPN hands over.
PROPOSALS = 1000

# Label maps have cells, so many along each side, as images of real scenes
# have some of the classes and not all.
_CELLS = 4


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
        make = functools.partial(MAKERS[config.default_scope], config)
    return [make(shape, generator).to(images.device) for _ in images]


def make_empty_samples(samples):
    """Samples of the same images without objects.

    Args:
        samples (list[DetDataSample]): Samples with ``gt_instances``.

    Returns:
        list[DetDataSample]: Copies as of unlabelled images.
    """
    empty = [sample.clone() for sample in samples]
    for sample in empty:
        sample.gt_instances = sample.gt_instances[:0]
        # From the original image to this view of it.
        sample.set_metainfo(
            dict(homography_matrix=np.eye(3, dtype=np.float32))
        )
    return empty


def count_classes(config):
    """Number of classes that all heads of a model have.

    Args:
        config (ConfigDict): Config of the model.

    Returns:
        int: The smallest number of classes in the config; 0 without any.
    """
    return min(
        _numbers(config, 'num_classes', 'num_things_classes'), default=0
    )


def count_views(config):
    """Number of views of each image that a model learns from.

    Args:
        config (Config): The config.

    Returns:
        int: The number; 0 for models that take single images.
    """
    for part in _transforms(config):
        if _name(part) == 'MultiView':
            views = part['num_views']
            return views if isinstance(views, int) else sum(views)
    return 0


def list_branches(config):
    """Names of the branches of a pipeline with unlabelled images.

    Args:
        config (Config): The config.

    Returns:
        list[str]: As in ``['sup', 'unsup_teacher', 'unsup_student']``; empty
        for a pipeline without branches.
    """
    for part in _transforms(config):
        if _name(part) == 'MultiBranch':
            return list(part['branch_field'])
    return []


def _make_detection(config, shape, generator):
    from mmdet.structures import DetDataSample

    # An RPN has no classes: objects are of the first.
    classes = count_classes(config.model) or 1
    height, width = shape['img_shape']
    boxes = _boxes(OBJECTS, height, width, generator)
    labels = torch.randint(classes, (OBJECTS,), generator=generator)
    instances = InstanceData(bboxes=boxes, labels=labels)
    sample = DetDataSample(metainfo=shape)
    # The preprocessor pads ground truth, too.
    padded = config.model.get('data_preprocessor') or {}
    if padded.get('pad_mask') or _loads(config, 'with_mask'):
        instances.masks = _box_masks(boxes, height, width)
    if padded.get('pad_seg') or _loads(config, 'with_seg'):
        things = _numbers(config.model, 'num_things_classes')
        stuff = _numbers(config.model, 'num_stuff_classes')
        total = max(things) + max(stuff) if things and stuff else classes
        labels = _label_map(total, shape, generator)
        sample.gt_sem_seg = PixelData(sem_seg=labels)
    if 'LoadProposals' in map(_name, _transforms(config)):
        proposals = _boxes(PROPOSALS, height, width, generator)
        scores = _uniform((PROPOSALS,), generator)
        sample.proposals = InstanceData(bboxes=proposals, scores=scores)
    sample.gt_instances = instances
    # Crowds and the like, of which there are none.
    sample.ignored_instances = InstanceData(
        bboxes=boxes[:0], labels=instances.labels[:0]
    )
    return sample


def _make_segmentation(config, shape, generator):
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=shape)
    classes = count_classes(config.model)
    if not classes:
        raise ValueError(
            'the config of a segmentor must say num_classes somewhere, got '
            f'{config.model.get("type")} without'
        )
    labels = _label_map(classes, shape, generator)
    sample.gt_sem_seg = PixelData(data=labels)
    kinds = [_name(part) for part in _transforms(config)]
    if 'GenerateEdge' in kinds:
        edges = torch.zeros_like(labels)
        edges[..., 1:] = labels[..., 1:] != labels[..., :-1]
        sample.gt_edge_map = PixelData(data=edges)
    if 'LoadDepthAnnotation' in kinds:
        depth = 1 + 9 * _uniform(labels.shape, generator)
        sample.gt_depth_map = PixelData(data=depth)
    return sample


def _make_classification(config, shape, generator):
    from mmpretrain.structures import DataSample

    classes = count_classes(config.model)
    if not classes:
        return _make_unlabelled(shape, generator)
    label = torch.randint(classes, (1,), generator=generator)
    return DataSample(metainfo=shape).set_gt_label(label)


def _make_unlabelled(shape, generator):
    from mmpretrain.structures import DataSample

    return DataSample(metainfo=shape)


MAKERS = dict(
    mmdet=_make_detection,
    mmseg=_make_segmentation,
    mmpretrain=_make_classification,
)


def _transforms(config):
    """Configs of the transforms of the training data, nested ones too."""
    loader = config.get('train_dataloader') or {}
    return parts_of(loader.get('dataset'))


def _loads(config, flag):
    """Whether a transform of the training data loads something.

    Args:
        config (Config): The config.
        flag (str): Argument of the transforms that says so, such as
            ``'with_mask'``.

    Returns:
        bool: As the transforms would have it; they are not built, for which
        some need packages.
    """
    with TRANSFORMS.switch_scope_and_registry(config.default_scope) as known:
        for part in _transforms(config):
            if not _name(part).startswith('Load'):
                continue
            kind = part['type']
            cls = kind if isinstance(kind, type) else known.get(kind)
            if part.get(flag, _default(cls, flag)):
                return True
    return False


def _default(cls, argument):
    """Default of an argument of a class or the bases that it is passed to."""
    for base in () if cls is None else cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        if argument in parameters:
            return parameters[argument].default
    return None


def _name(part):
    """Name of the class that a config is of, without its package."""
    kind = part.get('type') or ''
    name = kind.__name__ if isinstance(kind, type) else kind
    return name.rpartition('.')[2]


def _numbers(config, *keys):
    """Numbers by these names anywhere in a config."""
    return [
        part[key]
        for part in parts_of(config)
        for key in keys
        if isinstance(part.get(key), int)
    ]


def _boxes(count, height, width, generator):
    """Boxes from an eighth to a half of the image, within the image."""
    size = torch.tensor([width, height])
    extent = size * (0.125 + 0.375 * _uniform((count, 2), generator))
    corner = (size - extent) * _uniform((count, 2), generator)
    return torch.cat([corner, corner + extent], dim=1)


def _box_masks(boxes, height, width):
    """Masks that fill their boxes, in the form of data sets."""
    from mmdet.structures.mask import BitmapMasks

    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long()):
        mask[top:bottom, left:right] = 1
    return BitmapMasks(masks.numpy(), height, width)


def _label_map(classes, shape, generator):
    cells = torch.randint(classes, (_CELLS, _CELLS), generator=generator)
    height, width = shape['img_shape']
    rows = torch.arange(height) * _CELLS // height
    columns = torch.arange(width) * _CELLS // width
    return cells[rows][:, columns][None]


def _uniform(size, generator):
    return torch.rand(size, generator=generator)
