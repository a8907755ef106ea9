"""MMDetection's own RetinaNet-R18, narrowed, and random images for it."""

import copy
import functools
import json

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.structures import InstanceData

CLASSES = 5
SIZE = 64

# Types that the config can name; the conversion adds the rest.
Q_CONV = dict(type='QConv2d')
Q_NORM = dict(type='QBN2d', requires_grad=True)


def make_config(compressed=False, **backbone):
    """The model of ``mmdet::retinanet/retinanet_r18_fpn_1x_coco.py``.

    Args:
        compressed (bool, optional): Name compressed layers wherever the
            model takes a name. Defaults to False.
        **backbone: Arguments of the backbone.

    Returns:
        Config: Of the model.
    """
    model = _stock_config().model
    model.backbone.update(init_cfg=None, base_channels=16, stem_channels=16)
    model.neck.update(in_channels=[16, 32, 64, 128], out_channels=32)
    model.bbox_head.update(
        in_channels=32, feat_channels=32, num_classes=CLASSES
    )
    if compressed:
        model.backbone.update(conv_cfg=Q_CONV, norm_cfg=Q_NORM)
        model.neck.update(conv_cfg=Q_CONV)
        model.bbox_head.update(conv_cfg=Q_CONV)
    model.backbone.update(backbone)
    return Config(model)


def _stock_config():
    return copy.deepcopy(_read_stock_config())


@functools.cache
def _read_stock_config():
    return get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')


def build(config, device, seed=0):
    """Build a model in training mode, with weights of a seed.

    Args:
        config (Config): From :func:`make_config`.
        device (torch.device): Where to.
        seed (int, optional): Seed. Defaults to 0.

    Returns:
        RetinaNet: The model.
    """
    # Many tests want the same.
    model = _build(json.dumps(config.to_dict(), sort_keys=True), seed)
    return copy.deepcopy(model).to(device)


@functools.cache
def _build(config, seed):
    register_all_modules()
    torch.manual_seed(seed)
    model = MODELS.build(json.loads(config))
    model.init_weights()
    return model.train()


def enliven(model):
    """Scale the initial weights so that every layer gets a gradient.

    They start from zero or nearly so, in the last norm of each residual block
    and in the head: a few iterations would hardly move anything else.

    Args:
        model (RetinaNet): Changed in place.

    Returns:
        RetinaNet: ``model``.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('bn2.weight'):
                parameter.fill_(0.5)
            if name.startswith('bbox_head') and name.endswith('weight'):
                parameter.mul_(8)
    return model


def make_batch(seed):
    """Two images of random pixels, with boxes.

    Args:
        seed (int): Seed.

    Returns:
        dict: What a data loader yields.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for count in (3, 2):
        corners = torch.rand(count, 2, generator=generator) * SIZE / 2
        sizes = 16 + torch.rand(count, 2, generator=generator) * SIZE / 3
        labels = torch.randint(CLASSES, (count,), generator=generator)
        shape = (SIZE, SIZE)
        sample = DetDataSample(
            metainfo=dict(
                img_shape=shape,
                ori_shape=shape,
                batch_input_shape=shape,
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corners, corners + sizes], dim=1),
            labels=labels,
        )
        samples.append(sample)
    images = torch.rand(2, 3, SIZE, SIZE, generator=generator) * 255
    return dict(inputs=list(images), data_samples=samples)


def compute_loss(model, seed=0):
    """The loss of one batch.

    Args:
        model (RetinaNet): The model.
        seed (int, optional): Seed of the batch. Defaults to 0.

    Returns:
        Tensor: Scalar.
    """
    data = model.data_preprocessor(make_batch(seed), True)
    losses = model(**data, mode='loss')
    return model.parse_losses(losses)[0]


def train(model, steps=3):
    """Train with SGD, as the official recipe does.

    Args:
        model (RetinaNet): The model.
        steps (int, optional): Iterations. Defaults to 3.

    Returns:
        list[float]: Losses.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4
    )
    losses = []
    for step in range(steps):
        loss = compute_loss(model, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
