"""Compressed training under MMEngine's runner."""

import contextlib

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch.distributed.fsdp import FullyShardedDataParallel

from ..codes.units import MIB
from ..config import (
    check_count,
    check_flag,
    checked,
    get_level,
    settings_of,
)
from ..convert.api import convert_model, get_precision
from ..graphs import use_cuda_graphs
from ..memory import Breakdown, Locator
from ..memory.meter import measure_activations
from ..modules.layout import use_channels_last
from ..names import require_named_layers
from ..ops import DEFAULT_GROUP_SIZE
from ..random import RoundingGenerator, default_generator
from .compiled import CompiledStep
from .peak import PeakMemory
from .samples import SampleIndex


class ActNNHook(Hook):
    """Convert the model, seed its rounding, and log memory.

    Conversion happens in ``before_run``: after the runner has wrapped the
    model and replaced its normalisation layers, before it initialises or
    loads weights. It therefore also converts layers that no config can name,
    and those that the runner has turned back into plain ones.

    Logged as ``actnn/...`` with every record of the training log:

    =================== ==================================================
    ``saved_mib``       kept for the backward pass by the whole model, in
                        MiB
    ``exact_mib``       memory that torch would have kept
    ``ratio``           the second over the first
    ``layers_ratio``    the same for the compressed layers alone
    ``host_mib``        how much of it has been swapped to the host, at
                        levels that do so
    ``peak_mib``        most memory allocated on the GPU in any step after
                        the warm-up, in MiB; without a GPU the largest
                        resident size of the process
    ``warmup_peak_mib`` the same for the first steps and, while cuDNN tries
                        out algorithms, steps with images of a new size:
                        mostly workspaces. Only with a GPU
    ``graphs_mib``      memory that CUDA graphs hold, with ``cuda_graphs``
    =================== ==================================================

    Activations are counted on the host in the iterations that are logged;
    nothing waits for the device. After the first one, a line of the log
    summarises uncompressed memory and its places;
    ``tools/analysis_tools/memory_report.py`` prints the complete list.

    With the runner's setting ``compile`` the hook converts nothing: compiled
    graphs keep the codes (:func:`mmactnn.compile`), and the log has a report
    on them after the first iteration, without the numbers above.

    Args:
        level (str | dict | Level, optional): See :func:`mmactnn.get_level`.
            Defaults to ``'L3'``. ``'L0'`` is exact training, bit for bit.
            With ``use_gradient`` the hook passes on the indices of samples.
        include (list[str], optional): See :func:`mmactnn.convert_model`.
        exclude (list[str], optional): See :func:`mmactnn.convert_model`.
        group_size (int, optional): Elements that share a range. Valid values
            are 64, 128, 256 and 512. Defaults to 256.
        interval (int, optional): Iterations between two measurements.
            Defaults to the interval of the ``LoggerHook``.
        filter_fn (Callable, optional): See :func:`mmactnn.convert_model`.
        channels_last (bool, optional): See :func:`mmactnn.convert_model`.
            Defaults to False.
        cuda_graphs (bool | list[str] | dict, optional): Parts of the model
            that run as CUDA graphs, see :func:`mmactnn.use_cuda_graphs`: True
            is backbone and neck (``['extract_feat']``); a dict has its
            keyword arguments. Defaults to False.

    Examples:
        >>> custom_hooks = [dict(type='ActNNHook', level='L3')]
    """

    # Before LoggerHook, which resets the counter of peak memory.
    priority = 'ABOVE_NORMAL'

    def __init__(
        self,
        level='L3',
        include=None,
        exclude=(),
        group_size=DEFAULT_GROUP_SIZE,
        interval=None,
        filter_fn=None,
        channels_last=False,
        cuda_graphs=False,
    ):
        interval = checked('interval', interval, check_count, optional=True)
        self.level = get_level(level)
        self.include = include
        self.exclude = exclude
        self.filter_fn = filter_fn
        self.group_size = group_size
        self.interval = interval
        self.channels_last = checked(
            'channels_last', channels_last, check_flag
        )
        self.cuda_graphs = _graph_options(cuda_graphs)
        self.generator = RoundingGenerator()
        self._samples = None
        self._precision = None
        # Where the runner compiles.
        self._compiled = None
        self._converted = False
        self._graphs = {}
        # Report of the conversion, until uncompressed memory is logged.
        self._report = None
        self._layers = ()
        self._loaded = None
        self._measured = False
        self._peak = PeakMemory()
        self._measuring = contextlib.ExitStack()
        self._meter = None

    def before_run(self, runner):
        """Convert the model if the runner is about to train.

        Args:
            runner (Runner): The runner.

        Raises:
            RuntimeError: If the config has a setting that is incompatible
                with compressed layers, names compressed layers but the model
                has none, or lists several of these hooks.
            ValueError: If it compiles, with CUDA graphs or choices of layers.
        """
        # Evaluation builds no optimizer and needs no compressed layers. It may
        # also come here after training.
        if self._converted or not isinstance(
            runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)
        ):
            return
        model = _unwrap(runner.model)
        _refuse_second_hook(runner)
        _refuse_efficient_conv_bn_eval(runner, model)
        self._refuse_swapping_shards(runner)
        self._compiled = CompiledStep.of(self, runner, model)
        if self._compiled is not None:
            if self.cuda_graphs is not None:
                raise ValueError(
                    'cuda_graphs are of layers, and compile='
                    f'{runner.cfg.get("compile")!r} has none: leave them out, '
                    "or compile with options={'triton.cudagraphs': True}"
                )
            if self.channels_last:
                use_channels_last(model)
            # That of graphs.
            self.generator = default_generator
        self.generator.manual_seed(runner.seed, stream=get_rank())
        self._set_interval(runner)
        if self._compiled is not None:
            self._converted = True
            runner.logger.info(
                'ActNN converts no layer: compile='
                f'{runner.cfg.get("compile")!r}, so that compiled graphs keep '
                f'the codes of level {self.level.name}'
            )
            return
        if self.level.use_gradient:
            self._samples = SampleIndex(runner.train_dataloader.dataset)
        report = convert_model(
            model,
            self.level,
            self.include,
            self.exclude,
            self.group_size,
            self.generator,
            num_samples=self._samples and len(self._samples),
            filter_fn=self.filter_fn,
            channels_last=self.channels_last,
        )
        self._layers = tuple(item.name for item in report.converted)
        if any(item.adaptive for item in report.converted):
            self._precision = get_precision(model)
        require_named_layers(
            model, runner.cfg.get('model'), self.include, self.exclude
        )
        runner.logger.info(str(report))
        if self.cuda_graphs is not None:
            self._graphs = use_cuda_graphs(model, **self.cuda_graphs)
        self._converted = True
        if not self.level.exact:
            self._report = report

    def _set_interval(self, runner):
        if self.interval is None:
            self.interval = next(
                (
                    hook.interval
                    for hook in runner.hooks
                    if isinstance(hook, LoggerHook)
                ),
                50,
            )

    def before_train(self, runner):
        """Restore the state of rounding if a run is resumed.

        Args:
            runner (Runner): The runner.

        Raises:
            ValueError: If the resumed run compressed other layers.
        """
        if self._compiled is not None:
            self._compiled.install(runner.model)
        loaded = self._loaded
        if loaded is None or runner.iter == 0:
            return  # initial weights, not a run to resume
        _require_same_layers(loaded.get('layers'), self._layers)
        changes = _compare_settings(loaded, self.level)
        if changes is not None:
            runner.logger.warning(
                f'resuming at level {self.level.name} what was trained at '
                f'{loaded["level"]}{changes}'
            )
        elif self._precision is not None and 'precision' in loaded:
            self._precision.load_state_dict(loaded['precision'])
        self.generator.manual_seed(loaded['seed'], stream=get_rank())

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Set the offset of rounding, and start to measure memory.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Index of the batch.
            data_batch (dict, optional): The batch.
        """
        # Rounding is a function of seed, rank, iteration and call, so that a
        # resumed run needs no more state than its iteration.
        self.generator.seek(runner.iter << 32)
        if self._samples is not None:
            self._precision.set_samples(self._samples.lookup(data_batch))
        if self._precision is not None and get_world_size() > 1:
            # All processes have to count this pass, even if some of them call
            # no adaptive layer, such as a mask head without instances.
            self._precision.begin_pass()
        self._peak.begin_step(data_batch)
        if self._measured and not self._is_due(batch_idx):
            return
        if self._compiled is not None:
            # The graphs' own report tells: hooks would compile anew.
            return
        self._measured = True
        model = _unwrap(runner.model)
        locate = None if self._report is None else Locator(model)
        self._meter = self._measuring.enter_context(
            measure_activations(model, locate)
        )

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        """Log the memory that the iteration kept.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Index of the batch.
            data_batch (dict, optional): The batch.
            outputs (dict, optional): Losses.
        """
        if self._precision is not None:
            self._precision.end_pass()
        # In every iteration, since LoggerHook may reset the counter after any.
        self._peak.end_step()
        if self._compiled is not None:
            self._compiled.report_once(runner.logger)
        if self._meter is None:
            return
        self._measuring.close()
        meter, self._meter = self._meter, None
        if self._report is not None:
            model, report = _unwrap(runner.model), self._report
            runner.logger.info(f'ActNN {Breakdown.of(meter, model, report)}')
            self._report = None
        scalars = dict(
            saved_mib=meter.saved_mib,
            exact_mib=meter.exact_mib,
            ratio=meter.ratio,
            layers_ratio=meter.layers_ratio,
        )
        if self._peak.peak_bytes is not None:
            scalars['peak_mib'] = self._peak.peak_bytes / MIB
        if self._peak.warmup_bytes is not None:
            scalars['warmup_peak_mib'] = self._peak.warmup_bytes / MIB
        if self._graphs:
            scalars['graphs_mib'] = sum(
                part.stats.pool_mib for part in self._graphs.values()
            )
        if self.level.swap:
            scalars['host_mib'] = meter.swapped_bytes / MIB
        for name, value in scalars.items():
            runner.message_hub.update_scalar(
                f'train/actnn/{name}', value, resumed=False
            )

    def after_train_epoch(self, runner):
        """Log the allocation of bits, and the use of CUDA graphs.

        Args:
            runner (Runner): The runner.
        """
        if self._precision is not None:
            runner.logger.info(_describe(self._precision.bits))
        for name, part in self._graphs.items():
            runner.logger.info(f'ActNN {name}: {part.stats}')

    def before_save_checkpoint(self, runner, checkpoint):
        """Save the state of rounding to the checkpoint.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): The checkpoint.
        """
        checkpoint['actnn'] = dict(
            level=self.level.name,
            settings=settings_of(self.level),
            layers=list(self._layers),
            seed=self.generator.seed,
        )
        if self._precision is not None:
            checkpoint['actnn']['precision'] = self._precision.state_dict()

    def after_load_checkpoint(self, runner, checkpoint):
        """Keep the state for :meth:`before_train`, if the run is resumed.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): The checkpoint.
        """
        self._loaded = checkpoint.get('actnn')

    def _refuse_swapping_shards(self, runner):
        if self.level.swap and isinstance(
            runner.model, FullyShardedDataParallel
        ):
            raise RuntimeError(
                f'level {self.level.name} swaps to the host what FSDP frees '
                'by itself: gathered parameters would be gone before they are '
                "copied. Use level='L3' with FSDP, or "
                f'{self.level.name} with DDP'
            )

    def _is_due(self, batch_idx):
        return self.every_n_inner_iters(batch_idx, self.interval)


def _graph_options(value):
    """Arguments of ``use_cuda_graphs``; None for no graphs."""
    if value is False or value is None:
        return None
    if value is True:
        return {}
    if isinstance(value, dict):
        unknown = set(value) - {'parts', 'max_graphs', 'warmup'}
        if unknown:
            raise ValueError(
                'cuda_graphs has the keys parts, max_graphs and warmup, got '
                f'{sorted(unknown)}'
            )
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(parts=list(value))
    raise TypeError(
        'cuda_graphs must be True, False, a list of parts or a dict, got '
        f'{value!r}'
    )


def _describe(bits):
    layers = ', '.join(f'{name}: {value:g}' for name, value in bits.items())
    return f'ActNN bits of the layers: {layers}'


def _unwrap(model):
    return model.module if is_model_wrapper(model) else model


def _refuse_second_hook(runner):
    levels = [h.level.name for h in runner.hooks if isinstance(h, ActNNHook)]
    if len(levels) > 1:
        raise RuntimeError(
            f'custom_hooks holds {len(levels)} ActNNHooks (levels '
            f'{", ".join(levels)}), and each would convert the model anew. '
            'Keep one: include, exclude and the rules of its level tell '
            'layers apart'
        )


def _require_same_layers(saved, now):
    """Raise if a run is resumed with other compressed layers."""
    if saved is None:
        return  # a checkpoint of an earlier version
    lost = [name for name in saved if name not in set(now)]
    new = [name for name in now if name not in set(saved)]
    parts = [
        f'{len(names)} {text} ({", ".join(names[:5])}'
        + (', ...)' if names[5:] else ')')
        for names, text in (
            (lost, 'were compressed and are not now'),
            (new, 'are compressed and were not'),
        )
        if names
    ]
    if parts:
        raise ValueError(
            'the run to resume compressed other layers: '
            f'{"; ".join(parts)}. Set include and exclude of ActNNHook (and '
            'the model) as they were, or start a new run from the weights: '
            'resume=False with load_from'
        )


def _compare_settings(loaded, level):
    """Describe differences between a saved level and one; None if equal."""
    saved, now = loaded.get('settings'), settings_of(level)
    if saved is None:  # a checkpoint of an earlier version
        return None if loaded['level'] == level.name else ''
    # Earlier versions had no choice of rounding.
    saved = dict(rounding='stochastic') | saved
    changed = [key for key in now if saved.get(key) != now[key]]
    if not changed:
        return None
    texts = (f'{key} was {saved.get(key)}, is {now[key]}' for key in changed)
    return f' ({"; ".join(texts)})'


def _refuse_efficient_conv_bn_eval(runner, model):
    asked = runner.cfg.get('efficient_conv_bn_eval')
    built = any(
        getattr(module, 'efficient_conv_bn_eval_forward', None) is not None
        for module in model.modules()
    )
    if asked is not None or built:
        raise RuntimeError(
            'efficient_conv_bn_eval and compressed layers exclude each other:'
            ' it computes convolution and normalisation by itself and never '
            'calls the layers, so that nothing would be saved. Remove '
            f'efficient_conv_bn_eval={asked!r} from the config, or ActNNHook'
        )
