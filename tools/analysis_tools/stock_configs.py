"""One config of each folder of a package's: its smallest model."""

import contextlib
import dataclasses
import importlib
import json

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch.overrides import TorchFunctionMode

from mmactnn.mmlab import synthetic

# Classes of models that learn from images.
_BASES = (
    'mmdet.models.detectors.BaseDetector',
    'mmseg.models.segmentors.BaseSegmentor',
)

# Reasons that a folder is omitted.
NO_TRAINING = 'no config that trains a model'
OTHER_TASK = 'trains no detector or segmentor from images'
NOT_BUILT = 'cannot be built: '


@dataclasses.dataclass(frozen=True)
class Choice:
    """Config of a folder.

    Attributes:
        package (str): Import name of the package.
        folder (str): Name of the folder.
        config (str): The config, as in ``mmdet::fcos/x.py``; empty if the
            folder is omitted.
        parameters (int): Number of the model's parameters.
        omitted (str): Reason that the folder is omitted, or empty.
    """

    package: str
    folder: str
    config: str = ''
    parameters: int = 0
    omitted: str = ''


def folders(package):
    """Folders of a package's configs.

    Args:
        package (str): Its import name.

    Returns:
        list[str]: Names, sorted; without those of bases.

    Raises:
        ValueError: If the package is not installed.
    """
    root = synthetic.stock_folder(package)
    return sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir() and path.name != '_base_'
    )


def choose(package, folder):
    """Choose the smallest model that a folder trains.

    Args:
        package (str): Import name of the package.
        folder (str): Name of the folder.

    Returns:
        Choice: The config; of several with equal models, the first by name.
    """
    importlib.import_module(f'{package}.utils').register_all_modules()
    root = synthetic.stock_folder(package)
    known = {}
    sizes = {}
    reasons = []
    for path in sorted((root / folder).rglob('*.py')):
        name = f'{package}::{path.relative_to(root)}'
        if '_base_' in path.parts or not _trains(path):
            continue
        try:
            config = synthetic.load_config(name)
            key = json.dumps(config.model.to_dict(), default=str)
            if key not in known:
                known[key] = _count_parameters(config)
            if known[key] is None:
                reasons.append(OTHER_TASK)
            else:
                sizes[name] = known[key]
        # Models of packages that are not installed, and the like.
        except Exception as error:
            line = ' '.join(str(error).split())
            reasons.append(f'{NOT_BUILT}{line}')
    if sizes:
        # The minimum is the first of equal ones.
        smallest = min(sizes, key=sizes.get)
        return Choice(package, folder, smallest, sizes[smallest])
    return Choice(
        package, folder, omitted=reasons[0] if reasons else NO_TRAINING
    )


def _trains(path):
    """Whether a config has a model and trains it."""
    config = Config.fromfile(path)
    keys = ('model', 'train_dataloader', 'train_cfg')
    return all(config.get(key) for key in keys)


def _count_parameters(config):
    """Number of a model's parameters; None if it learns another task."""
    synthetic.drop_pretrained(config.model)
    scope = config.default_scope
    with DefaultScope.overwrite_default_scope(scope), _Uninitialised():
        model = MODELS.build(config.model)
    if not isinstance(model, tuple(_bases())):
        return None
    return sum(p.numel() for p in model.parameters())


def _bases():
    for name in _BASES:
        with contextlib.suppress(ImportError):
            module, _, cls = name.rpartition('.')
            yield getattr(importlib.import_module(module), cls)


class _Uninitialised(TorchFunctionMode):
    """Leaves out random initialisation, which takes most of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if name.endswith('_') and name.rstrip('_') in _RANDOM:
            if args and isinstance(args[0], torch.Tensor):
                return args[0]
        return func(*args, **(kwargs or {}))


_RANDOM = {
    'erfinv',
    'kaiming_normal',
    'kaiming_uniform',
    'normal',
    'trunc_normal',
    'uniform',
    'xavier_normal',
    'xavier_uniform',
}
