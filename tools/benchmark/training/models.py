"""Models and one batch of synthetic data for each."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 1000

_RESNET = 'resnet:'
_RESNET_DEFAULTS = dict(depth=152, width=64)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and what it is trained on.

    Attributes:
        model (nn.Module): In training mode, on its device.
        compute_loss (Callable): Runs the model forward on the one batch.
    """

    model: nn.Module
    compute_loss: Callable


def build_task(trial):
    """Build the model and the batch of a trial, always the same.

    Args:
        trial (Trial): Its model is the path of a config of MMDetection,
            MMSegmentation or MMPretrain, a config of an installed package
            (``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``), the name of
            a classifier of torchvision (``resnet50``), or a ResNet of any
            size (``resnet:depth=302,width=64``).

    Returns:
        Task: The task.

    Raises:
        ValueError: If there is no such model.
    """
    torch.manual_seed(0)
    if is_config(trial.model):
        # Imports MMEngine, which classifiers do not need.
        from mmactnn.mmlab import synthetic

        config = synthetic.load_config(trial.model, trial.cfg_options)
        model, compute_loss = synthetic.build_task(config, make_images(trial))
        return Task(place(model, trial), compute_loss)
    model = build_classifier(trial.model).train()
    images = make_images(trial)
    labels = torch.randint(CLASSES, (trial.batch_size,), device=trial.device)
    model = place(model, trial)

    def compute_loss():
        return F.cross_entropy(model(images), labels)

    return Task(model, compute_loss)


def is_config(name):
    """Whether a model is named by a config.

    Args:
        name (str): The model.

    Returns:
        bool: True for ``package::config`` and for files.
    """
    return '::' in name or name.endswith('.py')


def make_images(trial):
    """Random normalised images.

    Args:
        trial (Trial): Says how many, how large, and where.

    Returns:
        Tensor[N, 3, H, W]: The images.
    """
    size = (trial.batch_size, 3, *trial.image_size)
    images = torch.randn(size, device=trial.device)
    return images.to(memory_format=_layout(trial))


def place(model, trial):
    """Put a model where a trial wants it.

    Args:
        model (nn.Module): The model.
        trial (Trial): Says on which device, and in which layout.

    Returns:
        nn.Module: The model.
    """
    return model.to(trial.device).to(memory_format=_layout(trial))


def build_classifier(name):
    """Build a classifier of torchvision.

    Args:
        name (str): Its name there, or ``resnet:depth=...,width=...``.

    Returns:
        nn.Module: The model, with random weights.

    Raises:
        ValueError: If there is no such model.
    """
    import torchvision

    if name.startswith(_RESNET):
        size = parse_resnet(name)
        return torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck,
            resnet_blocks(size['depth']),
            width_per_group=size['width'],
        )
    try:
        make = getattr(torchvision.models, name)
    except AttributeError:
        raise ValueError(
            'a model must be a config (PATH.py or package::PATH.py), a '
            'classifier of torchvision or resnet:depth=D,width=W; got '
            f'{name!r}'
        ) from None
    return make()


def parse_resnet(name):
    """The size of a ResNet that is named by it.

    Args:
        name (str): ``resnet:depth=...,width=...``, either or both.

    Returns:
        dict[str, int]: ``depth`` and ``width``, by default ResNet-152's.

    Raises:
        ValueError: If this is no such name.
    """
    size = dict(_RESNET_DEFAULTS)
    for option in name.removeprefix(_RESNET).split(','):
        key, _, value = option.partition('=')
        if (
            not name.startswith(_RESNET)
            or key not in size
            or not value.isdecimal()
        ):
            raise ValueError(
                'a scaled ResNet must be resnet:depth=D,width=W with whole '
                f'numbers, or one of both, got {name!r}'
            )
        size[key] = int(value)
    return size


def scale_resnet(name, **size):
    """A ResNet of another size.

    Args:
        name (str): ``resnet:depth=...,width=...``.
        **size (int): New ``depth`` or ``width``.

    Returns:
        str: Its name.
    """
    size = {**parse_resnet(name), **size}
    return _RESNET + ','.join(f'{key}={size[key]}' for key in size)


def resnet_blocks(depth):
    """Blocks in the stages of a ResNet, as those of torchvision go on.

    The third stage takes what is added. The other ones are those of
    ResNet-50, or from 152 layers on those of ResNet-152.

    Args:
        depth (int): Layers, of which a block has three. What is left over is
            dropped.

    Returns:
        list[int]: Blocks in each of the four stages.

    Raises:
        ValueError: If the depth leaves no block to the third stage.

    Examples:
        >>> resnet_blocks(101)
        [3, 4, 23, 3]
    """
    first, second, last = 3, 8 if depth >= 152 else 4, 3
    # The stem and the classifier are a layer each.
    third = (depth - 2) // 3 - first - second - last
    if third < 1:
        raise ValueError(
            f'the depth of a ResNet must be 35 or more, got {depth}'
        )
    return [first, second, third, last]


def _layout(trial):
    if trial.channels_last:
        return torch.channels_last
    return torch.contiguous_format
