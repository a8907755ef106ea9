"""Trainings in two processes, and the same by hand in one."""

import functools
import os
import re
import tempfile

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import (
    DATASETS,
    FUNCTIONS,
    HOOKS,
    MODELS,
    STRATEGIES,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from mmactnn import RoundingGenerator, convert_model, get_precision
from mmactnn.mmlab.launch import build_runner
from support.processes import run_in_processes
from support.toy import make_config

WORLD, BATCH, STEPS = 2, 2, 4
SAMPLES = WORLD * BATCH * STEPS
LR, MOMENTUM = 0.1, 0.9

_WRAPPED = re.compile(r'_(fsdp|checkpoint)_wrapped_module\.')

# By name: what is particular of a model and of its training.
CASES = {
    'plain': dict(),
    'unused': dict(
        model=dict(chooses=True), wrapper=dict(find_unused_parameters=True)
    ),
    'static': dict(
        model=dict(norm='BN'),
        wrapper=dict(static_graph=True),
        checkpointed=['even', 'odd'],
    ),
    'accumulating': dict(accumulates=2),
    'sync': dict(model=dict(norm='SyncBN')),
}


@MODELS.register_module()
class Branches(BaseModel):
    """A stem, two branches and a head, of torch's layers.

    All instances start with the same weights.

    Args:
        norm (str, optional): ``'GN'`` works on samples, ``'SyncBN'`` on the
            batch of all processes, ``'BN'`` on the batch. Defaults to
            ``'GN'``.
        chooses (bool, optional): Let the first label tell which one of the
            branches runs. Defaults to False: both do.
    """

    def __init__(self, norm='GN', chooses=False, **kwargs):
        super().__init__(**kwargs)
        norms = dict(
            GN=functools.partial(nn.GroupNorm, 2),
            SyncBN=nn.SyncBatchNorm,
            BN=nn.BatchNorm2d,
        )
        self.chooses = chooses

        def block(channels):
            return nn.Sequential(
                nn.Conv2d(channels, 8, 3), norms[norm](8), nn.ReLU()
            )

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(4)
            self.stem = block(3)
            self.even = block(8)
            self.odd = block(8)
            self.head = nn.Linear(8, 4)

    def forward(self, inputs, labels=None, mode='tensor'):
        x = self.stem(inputs)
        if self.chooses:
            x = self.odd(x) if labels[0] % 2 else self.even(x)
        else:
            x = self.even(x) + self.odd(x)
        scores = self.head(x.mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, labels))
        return scores


@DATASETS.register_module()
class LabelledNoise(Dataset):
    """Random images and labels."""

    def __init__(self):
        generator = torch.Generator().manual_seed(6)
        self.images = torch.randn(SAMPLES, 3, 12, 12, generator=generator)
        self.labels = torch.randint(4, (SAMPLES,), generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return dict(inputs=self.images[index], labels=self.labels[index])


@HOOKS.register_module()
class RankHook(Hook):
    """Keeps what this process trains, in its class's attribute ``state``."""

    priority = 'LOWEST'
    state = None

    def before_train(self, runner):
        """Start to keep."""
        RankHook.state = dict(saved_mib=[], first_grad=None)

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        """Note what was measured, and the first gradient."""
        name = 'train/actnn/saved_mib'
        if name in runner.message_hub.log_scalars:
            scalar = runner.message_hub.get_scalar(name)
            self.state['saved_mib'].append(scalar.current())
        if batch_idx == 0:
            grad = next(runner.model.parameters()).grad
            self.state['first_grad'] = None if grad is None else grad.clone()

    def after_train(self, runner):
        """Note the weights and the bits."""
        model = runner.model
        with FullyShardedDataParallel.summon_full_params(model):
            self.state['model'] = {
                _WRAPPED.sub('', name): parameter.detach().clone()
                for name, parameter in model.module.named_parameters()
            }
        try:
            self.state['bits'] = get_precision(model).bits
        except ValueError:  # an exact level, or no hook
            self.state['bits'] = None


@FUNCTIONS.register_module()
def is_branch(module):
    """A ``check_fn`` of ``activation_checkpointing``."""
    return isinstance(module, nn.Sequential)


@FUNCTIONS.register_module()
def wraps_branches(module, recurse, nonwrapped_numel):
    """An ``auto_wrap_policy``: each branch is a unit of its own."""
    return recurse or is_branch(module)


@STRATEGIES.register_module()
class ResumingFSDPStrategy(FSDPStrategy):
    """MMEngine's, which hands torch its arguments in an order of old."""

    def load_optim_state_dict(self, state_dict):
        optimizer = self.optim_wrapper.optimizer
        state = FullyShardedDataParallel.optim_state_dict_to_load(
            self.model, optimizer, state_dict
        )
        self.optim_wrapper.load_state_dict(state)


def train_by_runner(
    folder, level, model=None, wrapper=None, checkpointed=None, accumulates=1,
    strategy=None, epochs=1, **kwargs,
):  # fmt: skip
    """Train in this process, which is one of a group.

    Args:
        folder (str): Where the runner writes.
        level (str | dict, optional): Of ``ActNNHook``; None for no hook.
        model (dict, optional): Arguments of :class:`Branches`.
        wrapper (dict, optional): Of ``model_wrapper_cfg``.
        checkpointed (list[str], optional): ``activation_checkpointing``.
        accumulates (int, optional): Iterations a step. Defaults to 1.
        strategy (dict, optional): Of the flexible runner, which it asks for.
        epochs (int, optional): Defaults to 1.
        **kwargs: For the runner.

    Returns:
        dict: See :class:`RankHook`.
    """
    hooks = [dict(type='RankHook')]
    if level is not None:
        hooks.insert(0, dict(type='ActNNHook', level=level, interval=1))
    cfg = make_config(folder, *hooks, epochs=epochs, **kwargs)
    cfg['model'] = dict(type='Branches', **(model or {}))
    cfg['optim_wrapper'] = dict(
        optimizer=dict(type='SGD', lr=LR, momentum=MOMENTUM),
        accumulative_counts=accumulates,
    )
    cfg['train_dataloader'].update(
        batch_size=BATCH,
        dataset=dict(type='LabelledNoise'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    cfg['env_cfg'] = dict(dist_cfg=dict(backend='gloo'))
    cfg['launcher'] = 'pytorch'
    cfg['log_level'] = 'WARNING'
    if wrapper is not None:
        cfg['model_wrapper_cfg'] = dict(
            type='MMDistributedDataParallel', **wrapper
        )
    if checkpointed is not None:
        cfg['activation_checkpointing'] = checkpointed
    if strategy is not None:
        cfg.update(runner_type='FlexibleRunner', strategy=strategy)
    build_runner(Config(cfg)).train()
    return RankHook.state


def train_by_hand(model=None, wrapper=None, checkpointed=None, accumulates=1):
    """Expected result of two processes: torch's layers in one process.

    Args:
        model (dict, optional): See :func:`train_by_runner`.
        wrapper (dict, optional): Makes no difference.
        checkpointed (list[str], optional): Makes no difference.
        accumulates (int, optional): Iterations a step. Defaults to 1.

    Returns:
        dict[str, Tensor]: The parameters of the model.
    """
    model = dict(model or {})
    whole = model.get('norm') == 'SyncBN'
    if whole:
        model['norm'] = 'BN'
    model = Branches(**model)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    data = LabelledNoise()
    for step in range(STEPS):
        batch = slice(step * WORLD * BATCH, (step + 1) * WORLD * BATCH)
        images, labels = data.images[batch], data.labels[batch]
        if whole:
            loss = model(images, labels, 'loss')['loss']
        else:  # processes take samples in turns
            loss = sum(
                model(images[r::WORLD], labels[r::WORLD], 'loss')['loss']
                for r in range(WORLD)
            )
            loss = loss / WORLD
        (loss / accumulates).backward()
        if (step + 1) % accumulates == 0:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.named_parameters())


def train_in_torch(rank, level, how):
    """Train without MMEngine, under one of torch's wrappers.

    Args:
        rank (int): Of this process.
        level (str): Level of the conversion.
        how (str): ``'ddp'``, ``'fsdp2'``, or ``'fsdp2, converted last'``.

    Returns:
        dict: ``model``, the whole parameters, and ``bits``.
    """
    model = Branches()
    generator = RoundingGenerator(seed=9, stream=rank)
    convert = functools.partial(convert_model, generator=generator)
    if 'last' not in how:
        convert(model, level)
    if how == 'ddp':
        wrapped = DistributedDataParallel(model)
    else:
        # The borders of a unit make another tensor of its input: a branch
        # that is one does not share the other's payload.
        for part in (model.stem, model.head, model):
            wrapped = fully_shard(part)
    if 'last' in how:
        report = convert(model, level)
        # The head, too, which has FSDP's class.
        assert len(report.converted) == 10
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    data = LabelledNoise()
    for step in range(STEPS):
        generator.seek(step << 32)
        first = step * WORLD * BATCH
        own = slice(first + rank, first + WORLD * BATCH, WORLD)
        loss = wrapped(data.images[own], data.labels[own], 'loss')['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        name: value.full_tensor() if hasattr(value, 'full_tensor') else value
        for name, value in model.named_parameters()
    }
    return dict(
        model=state,
        bits=get_precision(model).bits if level == 'L3' else None,
    )


def fsdp_strategy(state='local', **kwargs):
    """The config of MMEngine's strategy, with a unit for each branch.

    Args:
        state (str, optional): ``'local'`` or ``'full'`` checkpoints.
        **kwargs: For the strategy.

    Returns:
        dict: The config.
    """
    if state == 'full':
        # Not `state_dict_cfg='full'`: offloading to the CPU what is there
        # already crashes in torch.
        state = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(
                type='FullStateDictConfig', rank0_only=True
            ),
            optim_state_dict_config=dict(
                type='FullOptimStateDictConfig', rank0_only=True
            ),
        )
    return dict(
        type='FSDPStrategy',
        state_dict_cfg=state,
        model_wrapper=dict(
            type='MMFullyShardedDataParallel',
            auto_wrap_policy='wraps_branches',
        ),
        **kwargs,
    )


def run_ddp(rank, folder):
    """All cases, at L0, at L3 and without the hook."""
    return _train_cases(rank, folder, CASES)


def _train_cases(rank, folder, names):
    found = {}
    os.environ['LOCAL_RANK'] = str(rank)
    for name in names:
        for level in (None, 'L0', 'L3'):
            if level is None and name == 'sync':
                continue  # torch's own layer does not run on the CPU
            found[name, level] = train_by_runner(
                f'{folder}/{name}{level}', level, **CASES[name]
            )
    return found


def run_fsdp(rank, folder):
    """FSDP by MMEngine's strategy and FSDP2, and DDP to compare with."""
    found = _train_cases(rank, folder, ['plain'])
    for level in (None, 'L0', 'L3'):
        found['strategy', level] = train_by_runner(
            f'{folder}/fsdp{level}', level, strategy=fsdp_strategy()
        )
    found['resumed', 'L3'] = train_by_runner(
        f'{folder}/fsdpL3',
        'L3',
        strategy=dict(fsdp_strategy(), type='ResumingFSDPStrategy'),
        epochs=2,
        resume=True,
    )
    found['unbroken', 'L3'] = train_by_runner(
        f'{folder}/unbroken', 'L3', strategy=fsdp_strategy(), epochs=2
    )
    checkpointing = dict(check_fn='is_branch')
    for level in ('L0', 'L3'):
        found['checkpointing', level] = train_by_runner(
            f'{folder}/checkpointing{level}',
            level,
            strategy=fsdp_strategy(activation_checkpointing=checkpointing),
        )
    found['rules', 'L3'] = train_by_runner(
        f'{folder}/rules',
        dict(rules={'stem.0': 8, 'even.*': 4}),
        strategy=fsdp_strategy('full', activation_checkpointing=checkpointing),
    )
    found['rules', 'L3']['checkpoint'] = torch.load(
        f'{folder}/rules/epoch_1.pth', weights_only=False
    )['state_dict']
    try:
        train_by_runner(f'{folder}/L4', 'L4', strategy=fsdp_strategy())
    except RuntimeError as error:
        found['refused', 'L4'] = str(error)
    for how in ('ddp', 'fsdp2', 'fsdp2, converted last'):
        for level in ('L0', 'L3'):
            found[how, level] = train_in_torch(rank, level, how)
    return found


def train_in_two_processes(run):
    """Train many times, for which one start of the processes serves.

    Args:
        run (Callable): :func:`run_ddp` or :func:`run_fsdp`.

    Returns:
        list[dict]: Of each process, what it has come to, by name and level.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run_in_processes(run, WORLD, folder)
