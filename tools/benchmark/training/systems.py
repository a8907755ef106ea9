"""Ways to train a model that are measured side by side."""

import contextlib
import dataclasses
import functools
import json
import os

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import mmactnn

from .trial import PRECISIONS

# How models name a switch that recomputes their blocks: those of OpenMMLab,
# and the DenseNets of torchvision.
_SWITCHES = ('with_cp', 'memory_efficient')

# Blocks of models without one, by name of the class, as in torchvision.
_BLOCKS = ('BasicBlock', 'Bottleneck')

_ALLOCATOR = 'PYTORCH_ALLOC_CONF'


@dataclasses.dataclass(frozen=True)
class System:
    """A way to train.

    Attributes:
        kind (str): ``'exact'``, ``'checkpoint'``, ``'save_on_cpu'``,
            ``'compile'`` or ``'level'``.
        precision (str, optional): One of ``PRECISIONS``; None follows the
            run.
        level (Level, optional): Of the last kind.
        budget (float, optional): Share of the activations that a compiled
            model may keep.
    """

    kind: str
    precision: str | None = None
    level: mmactnn.Level | None = None
    budget: float | None = None

    @property
    def environment(self):
        """dict[str, str]: What its process must find in the environment."""
        if self.level is None or not self.level.expandable:
            return {}
        settings = [os.environ.get(_ALLOCATOR), 'expandable_segments:True']
        return {_ALLOCATOR: ','.join(filter(None, settings))}

    def prepare(self, model, batch_size):
        """Change a model in place, so that it is trained this way.

        Args:
            model (nn.Module): The model, on its device.
            batch_size (int): Images in a batch, which is all the data.

        Raises:
            ValueError: If the system can do nothing for this model.
            RuntimeError: If the level lacks what it needs of the allocator.
        """
        if self.kind == 'level':
            mmactnn.convert_model(model, self.level, num_samples=batch_size)
        elif self.kind == 'checkpoint':
            checkpoint_blocks(model)
        elif self.kind == 'compile':
            if self.budget is not None:
                torch._functorch.config.activation_memory_budget = self.budget
            model.compile()

    def forward_context(self, model, batch_size, meter=None):
        """What a forward pass runs in.

        Args:
            model (nn.Module): The model, prepared.
            batch_size (int): Images in the batch.
            meter (ActivationMeter, optional): Told what is saved, where the
                context hides it from the meter's own hooks.

        Returns:
            AbstractContextManager: The context.
        """
        if self.kind == 'save_on_cpu':
            pin = next(model.parameters()).is_cuda
            return _SaveOnCPU(pin, meter)
        if self.level is not None and self.level.use_gradient:
            precision = mmactnn.get_precision(model)
            precision.set_samples(range(batch_size))
        return contextlib.nullcontext()


def parse_system(name):
    """A system by name.

    Args:
        name (str): ``exact``, ``checkpoint`` (blocks are computed again),
            ``save_on_cpu`` (torch's), ``compile``, ``compile:0.3`` (keeping
            that share of the activations), a level (``L3``), or a level and
            what differs from it as json (``L3:{"conv": 4}``); and perhaps
            the precision (``exact+fp16``).

    Returns:
        System: The system.

    Raises:
        ValueError: If there is no such system.
    """
    base, plus, precision = name.rpartition('+')
    if not plus or precision not in PRECISIONS:
        base, precision = name, None
    kind, colon, argument = base.partition(':')
    if kind in mmactnn.LEVELS:
        level = _parse_level(kind, argument) if colon else kind
        return System('level', precision, level=mmactnn.get_level(level))
    if kind == 'compile' and colon:
        return System(kind, precision, budget=_parse_budget(argument))
    if colon or kind not in ('exact', 'checkpoint', 'save_on_cpu', 'compile'):
        raise ValueError(
            'a system must be exact, checkpoint, save_on_cpu, compile, '
            f'compile:BUDGET, one of {", ".join(mmactnn.LEVELS)}, or one of '
            f'these with :JSON, each perhaps with +{"|+".join(PRECISIONS)}; '
            f'got {name!r}'
        )
    return System(kind, precision)


def checkpoint_blocks(model):
    """Let the blocks of a model be computed again in the backward pass.

    Args:
        model (nn.Module): Changed in place: by its own switches if it has
            any, else by a checkpoint around each residual block.

    Raises:
        ValueError: If it has neither.
    """
    found = False
    for module in model.modules():
        for switch in _SWITCHES:
            if isinstance(getattr(module, switch, None), bool):
                setattr(module, switch, True)
                found = True
    if found:
        return
    blocks = [m for m in model.modules() if type(m).__name__ in _BLOCKS]
    if not blocks:
        raise ValueError(
            f'checkpoint needs a model with modules that have one of '
            f'{_SWITCHES}, or of a class in {_BLOCKS}, got '
            f'{type(model).__name__}'
        )
    for block in blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False
        )


class _SaveOnCPU(save_on_cpu):
    """As torch's, and a meter hears of it: only hooks on top are called."""

    def __init__(self, pin_memory, meter=None):
        super().__init__(pin_memory=pin_memory)
        if meter is None:
            return
        pack = self.pack_hook

        def count_and_pack(tensor):
            meter.observe(tensor, swapped=True)
            return pack(tensor)

        self.pack_hook = count_and_pack


def _parse_level(base, text):
    try:
        changes = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'what follows {base}: must be a json object, got {text!r}'
        ) from error
    if not isinstance(changes, dict):
        raise ValueError(
            f'what follows {base}: must be a json object, got {text!r}'
        )
    return dict(changes, base=base)


def _parse_budget(text):
    try:
        budget = float(text)
    except ValueError:
        budget = None
    if budget is None or not 0 <= budget <= 1:
        raise ValueError(
            'the budget of compile must be a number within 0 and 1, got '
            f'{text!r}'
        )
    return budget
