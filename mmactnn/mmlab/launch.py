"""Common code of ``tools/train.py`` and ``tools/test.py``.

Importing this module imports ``mmactnn``, which teaches MMEngine to resolve
``mmactnn::`` and ``mmseg::`` bases; it has to happen before a config is read.
"""

import argparse
import contextlib
import difflib
import gc
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist
from mmengine._strategy import FSDPStrategy
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_distributed
from mmengine.model import (
    MMDistributedDataParallel,
    MMFullyShardedDataParallel,
)
from mmengine.registry import MODEL_WRAPPERS, RUNNERS, STRATEGIES
from mmengine.runner import Runner

from .hook import ActNNHook


class UsageError(ValueError):
    """Mistake in a command line, or in a file that it names."""


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn users' mistakes into a message without a traceback, as a context.

    Raises:
        SystemExit: For a :class:`UsageError` or a missing file.
    """
    try:
        yield
    except (UsageError, FileNotFoundError) as error:
        raise SystemExit(f'error: {error}') from None


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """``MMDistributedDataParallel`` for processes without a GPU.

    torch's class refuses models with a SyncBatchNorm there, since torch's
    layer cannot run. ``QSyncBatchNorm`` can, and torch's own layer raises
    when it is called.

    Args:
        module (nn.Module): The model.
        device_ids (list[int], optional): Ignored, as there are no GPUs.
        **kwargs: As the base class.
    """

    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)

    def _passing_sync_batchnorm_handle(self, module):
        pass


@MODEL_WRAPPERS.register_module()
class CPUFullyShardedDataParallel(MMFullyShardedDataParallel):
    """``MMFullyShardedDataParallel`` for processes without a GPU.

    torch selects an accelerator unless a device is given.

    Args:
        module (nn.Module): The model.
        device_id (int, optional): Ignored, as there is no GPU.
        **kwargs: As the base class.
    """

    def __init__(self, module, device_id=None, **kwargs):
        super().__init__(module, device_id=torch.device('cpu'), **kwargs)


_CPU_WRAPPERS = {
    MMDistributedDataParallel.__name__: CPUDistributedDataParallel.__name__,
    MMFullyShardedDataParallel.__name__: CPUFullyShardedDataParallel.__name__,
}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share.

    Args:
        parser (argparse.ArgumentParser): Parser to add them to.
    """
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='directory for logs, checkpoints and results'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, such as '
        'custom_hooks.0.level=L2, custom_hooks.0.level.conv=4 or '
        'key="[(a,b),(c,d)]" (no blanks in it)',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed job',
    )
    # Both spellings exist among launchers.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and merge the common arguments into it.

    The work directory comes from the command line, else from the config, and
    defaults to ``./work_dirs/<name of the config file>``.

    Args:
        args (argparse.Namespace): Arguments that include those of
            :func:`add_common_arguments`.

    Returns:
        Config: The merged config.

    Raises:
        UsageError: If the file does not exist, an option has no effect, or an
            argument of ``ActNNHook`` is not valid.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    _require_file(args.config)
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        _merge_options(cfg, args.cfg_options)
    _check_hooks(cfg)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('./work_dirs', Path(args.config).stem)
    if cfg.get('default_scope') == 'mmpretrain':
        _complete_loaders(cfg)
    return cfg


def _require_file(path: str) -> None:
    """Raise if a config does not exist, and suggest a similar name."""
    if os.path.isfile(path):
        return
    folder, name = os.path.split(path)
    names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
    close = difflib.get_close_matches(name, names, 1)
    advice = f', did you mean {os.path.join(folder, close[0])}?'
    raise UsageError(f'no config {path}' + (advice if close else ''))


def _merge_options(cfg: Config, options: dict) -> None:
    """Merge ``--cfg-options`` into a config.

    Args:
        cfg (Config): The config, changed in place.
        options (dict): Values by dotted keys.
    """
    for key in options:
        _check_option(cfg, key)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UsageError(f'--cfg-options: {error}') from error


def _check_option(cfg: Config, option: str) -> None:
    """Raise for an option that is likely a misspelt key of the config.

    New keys are valid. The name of a level within the path is replaced by a
    variation of the level, so that ``custom_hooks.0.level.conv=4`` has a dict
    to change.
    """
    holder, path = cfg._cfg_dict, option.split('.')
    for i, key in enumerate(path):
        where = f'--cfg-options {option}'
        if isinstance(holder, list):
            if not key.isdigit() or int(key) >= len(holder):
                raise UsageError(
                    f'{where}: {".".join(path[:i])} has the items 0 to '
                    f'{len(holder) - 1}, got {key!r}'
                )
            holder = holder[int(key)]
            continue
        if not isinstance(holder, dict):
            return  # MMEngine raises its own error
        if key not in holder:
            close = difflib.get_close_matches(key, holder, 1, cutoff=0.85)
            if close:
                raise UsageError(
                    f'{where}: no {key!r} in the config, did you mean '
                    f'{close[0]!r}?'
                )
            return
        if (
            key == 'level'
            and i + 1 < len(path)
            and isinstance(holder[key], str)
        ):
            holder[key] = ConfigDict(base=holder[key])
        holder = holder[key]


def _check_hooks(cfg: Config) -> None:
    """Raise if an argument of ``ActNNHook`` is not valid."""
    for i, hook in enumerate(cfg.get('custom_hooks') or ()):
        if not isinstance(hook, dict):
            continue
        options = dict(hook)
        kind = options.pop('type', None)
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        if name.split('.')[-1] != ActNNHook.__name__:
            continue
        for key in ('priority', '_scope_'):
            options.pop(key, None)
        try:
            ActNNHook(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f'custom_hooks.{i}: {error}') from error


def _complete_loaders(cfg: Config) -> None:
    """Add settings to data loaders that MMPretrain's own tools add.

    Its recipes omit them.
    """
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        loader.setdefault('pin_memory', True)
        workers = loader.get('num_workers', 0)
        loader.setdefault('persistent_workers', workers > 0)
        loader.setdefault('collate_fn', dict(type='default_collate'))


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Check that the files a config reads exist, before anything is built.

    These are annotation files and image folders of the splits' datasets, also
    within wrappers, and annotation files of their evaluators. Paths on a
    remote storage backend are not checked.

    Args:
        cfg (Config): The config.
        splits (Iterable[str]): Splits to check, out of ``'train'``,
            ``'val'`` and ``'test'``.

    Raises:
        FileNotFoundError: If any path is missing. The message lists all of
            them, and the remedy.
    """
    missing = {}
    for split in splits:
        key = f'{split}_dataloader'
        loader = cfg.get(key) or {}
        for dataset in _iter_datasets(loader.get('dataset')):
            for kind, path in _dataset_paths(dataset):
                if not os.path.exists(path):
                    missing.setdefault(path, f'{kind} of {key}')
        key = f'{split}_evaluator'
        for path in _evaluator_paths(cfg.get(key)):
            if not os.path.exists(path):
                missing.setdefault(path, f'annotation file of {key}')
    if missing:
        raise FileNotFoundError(_missing_data_message(cfg.filename, missing))


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config, with or without a GPU.

    Args:
        cfg (Config): The merged config.

    Returns:
        Runner: The runner, ready to train or test.

    Raises:
        RuntimeError: If a distributed job without a GPU was started by
            another launcher than torchrun.
    """
    notes = []
    if cfg.launcher != 'none' and not torch.cuda.is_available():
        notes = _distribute_on_cpu(cfg)
    if 'runner_type' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
    for note in notes:
        runner.logger.warning(note)
    return runner


def leave_process_group() -> None:
    """Destroy the process group of a distributed job that succeeded.

    If a group exists when the interpreter ends, its threads may abort the
    process, which the launcher reports as a failure. A model in DDP refers to
    the group: delete the runner first. All processes wait for each other.
    """
    if is_distributed():
        torch_dist.barrier()
        # Runners are parts of cycles.
        gc.collect()
        torch_dist.destroy_process_group()


def _distribute_on_cpu(cfg: Config) -> list[str]:
    """Set up a process group of CPU processes, and a model wrapper for it.

    MMEngine's own set-up selects a CUDA device for each process, and passes
    device ids to DDP or FSDP; torch refuses both without a GPU. The runner
    uses an existing process group.

    Args:
        cfg (Config): The merged config; its model wrapper is adapted.

    Returns:
        list[str]: Deviations from the config, for the log.
    """
    if cfg.launcher != 'pytorch':
        raise RuntimeError(
            f'--launcher {cfg.launcher} needs a GPU for each process, but '
            'torch sees none; without one start the processes with torchrun '
            '(tools/dist_train.sh, tools/dist_test.sh) and --launcher pytorch'
        )
    wrapper = _model_wrapper(cfg)
    wrapper.type = _CPU_WRAPPERS.get(wrapper.type, wrapper.type)

    dist_cfg = cfg.get('env_cfg', {}).get('dist_cfg', {})
    if not is_distributed():
        options = {}
        if 'timeout' in dist_cfg:
            options['timeout'] = timedelta(seconds=dist_cfg['timeout'])
        torch_dist.init_process_group('gloo', **options)
    backend = dist_cfg.get('backend', 'nccl')
    if backend == 'gloo':
        return []
    return [
        f'No GPU is available: the processes communicate through gloo, not '
        f'through {backend} as env_cfg.dist_cfg says.'
    ]


def _model_wrapper(cfg: Config) -> ConfigDict:
    """Config of the model wrapper, with the runner's defaults.

    Args:
        cfg (Config): The merged config; a missing part is added.

    Returns:
        ConfigDict: The part of the config, with a ``type``.
    """
    default = dict(
        type=MMDistributedDataParallel.__name__, broadcast_buffers=False
    )
    if cfg.get('runner_type') == 'FlexibleRunner':
        if cfg.get('strategy') is None:
            cfg.strategy = dict(type='DDPStrategy')
        holder, key = cfg.strategy, 'model_wrapper'
        if issubclass(STRATEGIES.get(cfg.strategy.type), FSDPStrategy):
            default = dict(type=MMFullyShardedDataParallel.__name__)
    else:
        holder, key = cfg, 'model_wrapper_cfg'
        default['find_unused_parameters'] = cfg.get(
            'find_unused_parameters', False
        )
    if holder.get(key) is None:
        holder[key] = default
    holder[key].setdefault('type', default['type'])
    return holder[key]


def _iter_datasets(dataset: dict | None) -> Iterator[dict]:
    """Yield the innermost datasets, which name files."""
    if not dataset:
        return
    inner = dataset.get('datasets') or [dataset.get('dataset')]
    if inner == [None]:
        yield dataset
        return
    for wrapped in inner:
        yield from _iter_datasets(wrapped)


def _dataset_paths(dataset: dict) -> Iterator[tuple[str, str]]:
    """Yield kind and path of a dataset's files, joined as it does."""
    if not _is_local(dataset):
        return
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = dict(img_path=prefixes)
    named = [('annotation file', dataset.get('ann_file'))]
    named += [(f"folder '{key}'", path) for key, path in prefixes.items()]
    for kind, path in named:
        # An empty name means no file, or the data root itself.
        if not path or not isinstance(path, str):
            continue
        path = os.path.join(dataset.get('data_root') or '', path)
        if '://' not in path:
            yield kind, path


def _evaluator_paths(evaluators: dict | list | None) -> Iterator[str]:
    if not isinstance(evaluators, (list, tuple)):
        evaluators = [evaluators or {}]
    for evaluator in evaluators:
        path = evaluator.get('ann_file')
        if path and _is_local(evaluator) and '://' not in path:
            yield path


def _is_local(cfg: dict) -> bool:
    backend_args = cfg.get('backend_args') or {}
    return backend_args.get('backend', 'local') == 'local'


def _missing_data_message(config: str, missing: dict[str, str]) -> str:
    width = max(map(len, missing))
    lines = [f'{config} names data that is not there:']
    lines += [f'  {path:<{width}}  ({what})' for path, what in missing.items()]
    lines.append('Do one of these:')
    coco_annotations = 'annotations/instances_train2017.json'
    coco_root = next(
        (
            path.removesuffix(coco_annotations)
            for path in missing
            if path.endswith(coco_annotations)
        ),
        None,
    )
    if coco_root is None:
        lines.append(
            '  - put the data set at these paths (tools/dataset_converters/ '
            'makes the small ones);'
        )
    else:
        lines += [
            '  - put COCO 2017 there: train2017.zip, val2017.zip and '
            f'annotations_trainval2017.zip, unpacked in {coco_root};',
            '  - put a small data set of the same shape there: python '
            'tools/dataset_converters/digits.py '
            f'{coco_root} --layout coco;',
        ]
    lines.append(
        '  - name other paths, as in --cfg-options '
        'train_dataloader.dataset.data_root=PATH'
    )
    return '\n'.join(lines)
