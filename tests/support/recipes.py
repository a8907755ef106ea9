"""Shipped configs of every toolbox on small data, on a CPU."""

import ast
import copy
import dataclasses
from pathlib import Path

import yaml
from mmengine.hooks import Hook
from mmengine.model import BaseAveragedModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.utils import get_installed_path

from mmactnn import measure_activations
from mmactnn.launch import build_runner
from support.tools import ROOT, load_tool
from support.torchvision_stub import make_torchvision_importable

# What the layer types of configs/_base_/actnn.py stand for.
STOCK_TYPES = dict(QBN2d='BN', QSyncBN='SyncBN', QReLU='ReLU')
LAYER_KEYS = ('conv_cfg', 'norm_cfg', 'act_cfg')

_train = load_tool('train.py')

SIZE, BATCH = 64, 2
# Sizes in pipelines; only those of the large data sets are replaced.
_SIZE_KEYS = ('scale', 'crop_size')


def list_recipes(metafile):
    """The configs that a metafile names.

    Args:
        metafile (str): Its name in ``configs/actnn/``.

    Returns:
        list[Path]: The configs.
    """
    text = (ROOT / 'configs/actnn' / metafile).read_text()
    return [ROOT / model['Config'] for model in yaml.safe_load(text)['Models']]


def load_recipe(path):
    """Read a shipped config and leave its pretrained weights out.

    Args:
        path (Path): The config.

    Returns:
        Config: The config; what it needs for its toolbox can be imported.
    """
    config = _train.build_config(_train.parse_args([str(path)]))
    if config.default_scope == 'mmpretrain':
        make_torchvision_importable()
    if config.model.get('pretrained'):
        config.model.pretrained = None
    backbone = config.model.backbone
    if (backbone.get('init_cfg') or {}).get('type') == 'Pretrained':
        backbone.init_cfg = None
    return config


def official_path(path):
    """The toolbox's own recipe behind a config that changes nothing of it.

    Args:
        path (Path): The config.

    Returns:
        Path, optional: The recipe; None if there is none.
    """
    bases = ast.literal_eval(ast.parse(path.read_text()).body[0].value)
    package, found, name = bases[0].partition('::')
    if not found or name.startswith('_base_/'):
        return None
    return Path(get_installed_path(package), '.mim/configs', name)


def without_layer_types(config):
    """A config without the types of layers, and scopes noted by MMEngine.

    Args:
        config (dict | list | Any): The config or a part of it.

    Returns:
        dict | list | Any: A copy.
    """
    if isinstance(config, dict):
        return {
            key: without_layer_types(value)
            for key, value in config.items()
            if key not in (*LAYER_KEYS, '_scope_')
        }
    if isinstance(config, (list, tuple)):
        return [without_layer_types(item) for item in config]
    return config


def name_stock_layers(config):
    """Name torch's layers in place of compressed ones.

    Args:
        config (dict): A model's config; changed in place.

    Returns:
        dict: ``config``.
    """
    for value in config.values():
        if isinstance(value, dict):
            name_stock_layers(value)
    for key in LAYER_KEYS:
        layer = config.get(key)
        if layer is not None and layer.type == 'QConv2d':
            config[key] = None
        elif layer is not None:
            layer.type = STOCK_TYPES.get(layer.type, layer.type)
    return config


def shrink(config, data, work_dir, iterations):
    """Let a config train for a few iterations on small images.

    Args:
        config (Config): From :func:`load_recipe`; changed in place.
        data (dict[str, Path]): Folder of the data of each toolbox.
        work_dir (Path): Where to write.
        iterations (int): How many.

    Returns:
        Config: ``config``.
    """
    by_epoch = config.train_cfg.get('type') != 'IterBasedTrainLoop'
    config.work_dir = str(work_dir)
    config.experiment_name = work_dir.name
    config.randomness = dict(seed=0)
    config.log_level = 'WARNING'
    if by_epoch:
        config.train_cfg.update(max_epochs=1, val_interval=1)
    else:
        config.train_cfg.update(max_iters=iterations, val_interval=iterations)
    config.default_hooks.checkpoint = dict(
        type='CheckpointHook',
        by_epoch=by_epoch,
        interval=1 if by_epoch else iterations,
        save_optimizer=False,
    )
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        if loader is not None:
            images = BATCH * (iterations if split == 'train' else 1)
            loader.update(
                batch_size=BATCH, num_workers=0, persistent_workers=False
            )
            loader.dataset = _SMALL[config.default_scope](
                loader.dataset, data[config.default_scope], split, images
            )
    if 'size' in config.model.get('data_preprocessor', ()):
        config.model.data_preprocessor.size = (SIZE, SIZE)
    # Negatives of the contrastive loss are as good as part of it.
    if 'queue_len' in config.model:
        config.model.queue_len = 8 * BATCH
    return config


def _small_segmentation(dataset, root, split, images):
    split = 'train' if split == 'train' else 'val'
    return dict(
        type='BaseSegDataset',
        data_root=str(root),
        img_suffix='.png',
        data_prefix=dict(img_path=split, seg_map_path=f'seg/{split}'),
        metainfo=dict(classes=('ground', *map(str, range(10)))),
        indices=images,
        pipeline=_resize(dataset.pipeline),
    )


def _small_classification(dataset, root, split, images):
    pipeline = _resize(dataset.pipeline)
    if pipeline[0].type != 'LoadImageFromFile':
        # Images of the data set lie in memory.
        pipeline.insert(0, dict(type='LoadImageFromFile'))
    return dict(
        type='CustomDataset',
        data_root=str(root),
        data_prefix='train' if split == 'train' else 'val',
        with_label=dataset.get('with_label', True),
        indices=images,
        pipeline=pipeline,
    )


_SMALL = dict(mmseg=_small_segmentation, mmpretrain=_small_classification)


def _resize(pipeline):
    """A copy of transforms, made for small images."""
    pipeline = copy.deepcopy(pipeline)
    for transform in _walk(pipeline):
        for key in _SIZE_KEYS:
            size = transform.get(key, 0)
            if isinstance(size, tuple) and min(size) > SIZE:
                transform[key] = (SIZE, SIZE)
            elif isinstance(size, int) and size > SIZE:
                transform[key] = SIZE
    return pipeline


def _walk(config):
    if isinstance(config, dict):
        yield config
        config = config.values()
    if not isinstance(config, str) and hasattr(config, '__iter__'):
        for item in config:
            yield from _walk(item)


@HOOKS.register_module()
class LossesHook(Hook):
    """Remembers losses and metrics of a run."""

    def __init__(self):
        self.losses = []
        self.metrics = None

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        self.losses.append(outputs['loss'].item())

    def after_val_epoch(self, runner, metrics=None):
        self.metrics = metrics


@dataclasses.dataclass
class Kept:
    """What a forward pass keeps, in bytes.

    Attributes:
        exact (int): What torch would keep.
        losses (int): What loss modules keep.
        averages (int): What moving averages of the model keep.
        rest (int): What is kept as it is, by neither.
    """

    exact: int
    losses: int
    averages: int
    rest: int


class _KeptBy:
    """Counts what modules keep during their calls.

    Args:
        meter (ActivationMeter): It is measuring.
        modules (Iterable[nn.Module]): The modules.
    """

    def __init__(self, meter, modules):
        self.nbytes = 0
        self._meter = meter
        self._handles = []
        for module in modules:
            self._handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave),
            ]

    def remove(self):
        """Count no more."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module, args):
        self.nbytes -= self._meter.saved_bytes

    def _leave(self, module, args, output):
        self.nbytes += self._meter.saved_bytes


def measure_kept(runner):
    """Measure one forward pass of a run's model.

    Args:
        runner (Runner): After training.

    Returns:
        Kept: The bytes.
    """
    model = runner.model.train()
    batch = next(iter(runner.train_dataloader))
    data = model.data_preprocessor(batch, True)
    parts = list(model.modules())
    with measure_activations(model) as meter:
        losses = _KeptBy(
            meter, (m for m in parts if type(m).__name__.endswith('Loss'))
        )
        averages = _KeptBy(
            meter, (m for m in parts if isinstance(m, BaseAveragedModel))
        )
        model(**data, mode='loss')
    losses.remove()
    averages.remove()
    rest = meter.saved_bytes - meter.layers_saved_bytes - losses.nbytes
    return Kept(meter.exact_bytes, losses.nbytes, averages.nbytes, rest)


@dataclasses.dataclass
class Outcome:
    """A run of a config.

    Attributes:
        runner (Runner): After training.
        losses (list[float]): Of every iteration.
        metrics (dict, optional): Of the evaluation.
        saved_mib (float): What the first iteration kept.
        exact_mib (float): What torch would have kept.
    """

    runner: Runner
    losses: list
    metrics: dict | None
    saved_mib: float
    exact_mib: float

    @property
    def checkpoint(self):
        """str: Path of the last one of the run."""
        return Path(self.runner.work_dir, 'last_checkpoint').read_text()


def build(config):
    """Build a config's runner as the tools do, with losses remembered.

    Args:
        config (Config): From :func:`shrink`.

    Returns:
        Runner: The runner.
    """
    config.custom_hooks.append(dict(type='LossesHook'))
    return build_runner(config)


def train(runner):
    """Train.

    Args:
        runner (Runner): From :func:`build`.

    Returns:
        Outcome: What happened.
    """
    runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, LossesHook))
    mib = {
        key: runner.message_hub.get_scalar(f'train/actnn/{key}').data[0][0]
        for key in ('saved_mib', 'exact_mib')
    }
    return Outcome(runner, hook.losses, hook.metrics, **mib)
