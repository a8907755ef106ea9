"""Models from configs of OpenMMLab, and synthetic data for them."""

import argparse
import importlib
import importlib.util
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from .ground_truth import (
    MAKERS,
    count_views,
    list_branches,
    make_empty_samples,
    make_samples,
)
from .parts import parts_of

# Raw pixels have about this mean and deviation.
_PIXEL_MEAN, _PIXEL_STD = 118.0, 58.0

# Weights of a model in whose outputs another one is trained.
_TEACHERS = ('teacher_ckpt',)


def build_task(config, images):
    """Build the model of a config, and a function that computes its loss.

    Images go to the model as from its data preprocessor, with random ground
    truth: neither pretrained weights nor data sets are read. Augmentations of
    whole batches, which change sizes, are left out.

    Args:
        config (Config): From :func:`load_config`; pretrained weights are
            removed from it.
        images (Tensor[N, 3, H, W]): The batch, normalised. For models that
            take several views of an image, the other ones are random.

    Returns:
        tuple[nn.Module, Callable]: The model, in training mode and on the
        device of the images; the function, without arguments.
    """
    model = build_model(config).to(images.device)
    # A model may return nothing from train().
    model.train()
    _start_training(model)
    inputs, samples = _make_batch(config, model, images)

    # Some models take the boxes out of them.
    proposals = [
        (sample, sample.proposals)
        for sample in (samples if isinstance(samples, list) else ())
        if 'proposals' in sample
    ]

    def compute_loss():
        for sample, given in proposals:
            sample.proposals = given.new()
        # Not model.loss, since hooks for swapping and compilation run at the
        # call of the model.
        losses = model(inputs, samples, mode='loss')
        return model.parse_losses(losses)[0]

    return model, compute_loss


def build_model(config):
    """Build the model of a config, with random weights.

    Args:
        config (Config): From :func:`load_config`; pretrained weights are
            removed from it.

    Returns:
        nn.Module: The model, as for a single process.
    """
    scope = config.default_scope
    drop_pretrained(config.model)
    for part in parts_of(config.model.get('data_preprocessor')):
        part.pop('batch_augments', None)
    importlib.import_module(f'{scope}.utils').register_all_modules()
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
        model.init_weights()
    # As the runner does in a single process.
    return revert_sync_batchnorm(model)


def _start_training(model):
    """Tell parts that schedule something that training begins."""
    progress = dict(epoch=0, iter=0, max_epochs=1, max_iters=1)
    for key, value in progress.items():
        MessageHub.get_current_instance().update_info(key, value)
    for module in model.modules():
        if callable(getattr(module, 'set_epoch', None)):
            module.set_epoch(0)


def _make_batch(config, model, images):
    """Inputs and samples as from a model's data preprocessor."""
    samples = make_samples(config, images)
    views = count_views(config)
    if views:
        others = [torch.randn_like(images) for _ in range(views - 1)]
        return [images, *others], samples
    if not _makes_ground_truth(model.data_preprocessor):
        return images, samples
    inputs = list(images * _PIXEL_STD + _PIXEL_MEAN)
    branches = list_branches(config)
    if branches:
        labelled, *others = branches
        empty = make_empty_samples(samples)
        inputs = dict.fromkeys(branches, inputs)
        samples = {labelled: samples, **dict.fromkeys(others, empty)}
    data = model.data_preprocessor(
        dict(inputs=inputs, data_samples=samples), training=True
    )
    return data['inputs'], data['data_samples']


def _makes_ground_truth(preprocessor):
    """Whether a preprocessor is one of detectors: it pads, at the least."""
    names = 'DetDataPreprocessor', 'MultiBranchDataPreprocessor'
    return any(cls.__name__ in names for cls in type(preprocessor).__mro__)


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
        path = stock_folder(package) / inside
    if not path.is_file():
        raise ValueError(f'a model must name a config, but {path} is no file')
    config = Config.fromfile(path)
    if colons:
        config.setdefault('default_scope', package)
    parser = argparse.ArgumentParser()
    parser.add_argument('options', nargs='*', action=DictAction)
    config.merge_from_dict(parser.parse_args(list(options)).options or {})
    scope = config.get('default_scope')
    if scope not in MAKERS:
        raise ValueError(
            f'default_scope of a config must be one of {", ".join(MAKERS)}, '
            f'got {scope!r} in {name}'
        )
    for part in parts_of(config.get('model')):
        _include_teacher(part, scope)
    return config


def stock_folder(package):
    """Folder of the configs that come with a package.

    Args:
        package (str): Its import name.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f'{package!r} is not installed')
    return Path(spec.origin).parent / '.mim' / 'configs'


def _include_teacher(part, package):
    """Replace the path of a teacher's config by the config.

    The path is one of the package's repository, as in ``configs/gfl/x.py``.
    """
    path = part.get('teacher_config')
    if isinstance(path, str) and not Path(path).is_file():
        inside = Path(path).relative_to('configs')
        teacher = Config.fromfile(stock_folder(package) / inside)
        part['teacher_config'] = dict(model=teacher.model)


def training_shape(config):
    """Size of the images that a config trains on, if it is fixed.

    Args:
        config (Config): The config.

    Returns:
        tuple[int, int], optional: Height and width, of the crops or else of
        the resized images; None if the config does not say.
    """
    loader = config.get('train_dataloader') or {}
    transforms = list(parts_of(loader.get('dataset')))
    for key, is_width_first in (
        ('crop_size', False),
        ('scale', True),
        ('img_scale', True),
    ):
        for part in transforms:
            size = part.get(key)
            if (
                isinstance(size, (tuple, list))
                and len(size) == 2
                and all(isinstance(side, int) for side in size)
            ):
                return tuple(reversed(size)) if is_width_first else tuple(size)
    return None


def drop_pretrained(config):
    """Remove pretrained weights, so that a model starts from random ones.

    Args:
        config (ConfigDict): Config of the model, changed in place.
    """
    for part in list(parts_of(config)):
        for key in ('pretrained', *_TEACHERS):
            if part.get(key) is not None:
                part[key] = None
        init = part.get('init_cfg')
        init = init if isinstance(init, list) else [init]
        if any(item and 'checkpoint' in item for item in init):
            part['init_cfg'] = None
