"""Models, each with one batch of synthetic data."""

import re

import torch
import torch.nn.functional as F


def build_task(trial):
    """Build the model and the batch of a trial, always the same.

    The model is the path of a config of OpenMMLab, a config of an installed
    package (``mmdet::path``), the name of a classifier of torchvision, or a
    ResNet of any size (``resnet:depth=302,width=64``).

    Returns:
        tuple[nn.Module, Callable]: The model, in training mode, and a
        function that returns its loss on the batch.
    """
    torch.manual_seed(0)
    layout = torch.preserve_format
    if trial.channels_last:
        layout = torch.channels_last
    size, device = (trial.batch_size, 3, *trial.image_size), trial.device
    if is_config(trial.model):
        # Imported here, as it imports MMEngine, which classifiers do not need.
        from mmactnn.mmlab import synthetic

        config = synthetic.load_config(trial.model, trial.cfg_options)
        images = torch.randn(size, device=device).to(memory_format=layout)
        model, compute_loss = synthetic.build_task(config, images)
        return model.to(memory_format=layout), compute_loss
    model = build_classifier(trial.model).train()
    images = torch.randn(size, device=device).to(memory_format=layout)
    labels = torch.randint(1000, size[:1], device=device)
    model = model.to(device=device, memory_format=layout)
    return model, lambda: F.cross_entropy(model(images), labels)


def is_config(name):
    """Whether a model is ``package::config`` or a file."""
    return '::' in name or name.endswith('.py')


def build_classifier(name):
    """Build a classifier of torchvision, by its name there or as a ResNet."""
    import torchvision

    if name.startswith('resnet:'):
        size = parse_resnet(name)
        return torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck,
            resnet_blocks(size['depth']),
            width_per_group=size['width'],
        )
    if not hasattr(torchvision.models, name):
        raise ValueError(
            'a model must be a config (PATH.py or package::PATH.py), a '
            'classifier of torchvision or resnet:depth=D,width=W; got '
            f'{name!r}'
        )
    return getattr(torchvision.models, name)()


def parse_resnet(name):
    """Dict of ``depth`` and ``width``, by default those of ResNet-152."""
    found = re.fullmatch(r'resnet:((depth|width)=\d+(,(?!$)|$)){1,2}', name)
    if not found:
        raise ValueError(
            'a scaled ResNet must be resnet:depth=D,width=W with whole '
            f'numbers, or one of both, got {name!r}'
        )
    size = re.findall(r'(\w+)=(\d+)', name)
    return dict(depth=152, width=64) | {key: int(n) for key, n in size}


def scale_resnet(name, **size):
    """Name of a ResNet with another ``depth`` or ``width``."""
    size = parse_resnet(name) | size
    return 'resnet:depth={depth},width={width}'.format(**size)


def resnet_blocks(depth):
    """Number of blocks in the stages of a ResNet of any depth.

    The third stage has the additional blocks, three layers each. The other
    stages are those of ResNet-50, or from 152 layers on those of ResNet-152.
    """
    first, second, last = 3, 8 if depth >= 152 else 4, 3
    # The stem and the classifier are a layer each.
    third = (depth - 2) // 3 - first - second - last
    if third < 1:
        raise ValueError(
            f'the depth of a ResNet must be 35 or more, got {depth}'
        )
    return [first, second, third, last]
