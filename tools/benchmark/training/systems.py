"""Systems that train models, to be compared."""

import contextlib
import dataclasses
import os
from functools import partial

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import mmactnn
from mmactnn.offload import attached_swap
from shared.levels import read_level

from .trial import PRECISIONS

# Attributes of models of OpenMMLab, and of torchvision's DenseNets, that
# enable checkpointing, and classes of blocks for models without one.
_SWITCHES = ('with_cp', 'memory_efficient')
_BLOCKS = ('BasicBlock', 'Bottleneck')

_KINDS = ('exact', 'checkpoint', 'save_on_cpu', 'compile')


@dataclasses.dataclass(frozen=True)
class System:
    """A way to train a model.

    Its ``budget`` is the share of the activations that a compiled model may
    keep, ``window_mib`` the device memory of copies of a level that swaps,
    and ``cuda_graphs`` are names of parts that run as CUDA graphs.
    """

    kind: str
    precision: str | None = None
    level: mmactnn.Level | None = None
    budget: float | None = None
    window_mib: float | None = None
    cuda_graphs: tuple = ()

    @property
    def environment(self):
        """dict[str, str]: Variables that its process needs."""
        if self.level is None or not self.level.expandable:
            return {}
        name = 'PYTORCH_ALLOC_CONF'
        settings = [os.environ.get(name), 'expandable_segments:True']
        return {name: ','.join(filter(None, settings))}

    def prepare(self, model, batch_size):
        """Change a model in place, for data of a batch."""
        if self.kind == 'level':
            mmactnn.convert_model(model, self.level, num_samples=batch_size)
            if self.window_mib is not None:
                attached_swap(model).window_mib = self.window_mib
            if self.cuda_graphs:
                mmactnn.use_cuda_graphs(model, self.cuda_graphs)
        elif self.kind == 'checkpoint':
            checkpoint_blocks(model)
        elif self.kind == 'compile':
            if self.budget is not None:
                torch._functorch.config.activation_memory_budget = self.budget
            model.compile()

    def forward_context(self, model, batch_size, meter=None):
        """Context of a forward pass; its hooks also report to a meter."""
        if self.kind == 'save_on_cpu':
            return _SaveOnCPU(next(model.parameters()).is_cuda, meter)
        if self.level is not None and self.level.use_gradient:
            precision = mmactnn.get_precision(model)
            precision.set_samples(range(batch_size))
        return contextlib.nullcontext()


def parse_system(name):
    """Make a system by name; raises ValueError if there is none.

    ``exact``, ``checkpoint`` (blocks are computed again), ``save_on_cpu``
    (torch's), ``compile``, ``compile:0.3`` (keeping that share of the
    activations), a level (``L3``), or a level and what differs from it as
    json (``L3:{"conv": 4}``), perhaps with the ``window_mib`` of its swap
    or the parts that run as CUDA graphs (``L3:{"cuda_graphs":
    ["extract_feat"]}``; ``[""]`` is the model); and perhaps the
    precision (``exact+fp16``).
    """
    base, _, precision = name.rpartition('+')
    if precision not in PRECISIONS:
        base, precision = name, None
    kind, colon, argument = base.partition(':')
    reason = ''
    try:
        if kind in mmactnn.LEVELS:
            level = read_level(base)
            window = level.pop('window_mib', None) if colon else None
            graphs = tuple(level.pop('cuda_graphs', ())) if colon else ()
            level = mmactnn.get_level(level)
            if window is None or level.swap and window > 0:
                return System(
                    'level',
                    precision,
                    level,
                    window_mib=window,
                    cuda_graphs=graphs,
                )
            reason = ': window_mib must be positive and of a level that swaps'
        elif kind == 'compile' and colon and 0 <= float(argument) <= 1:
            return System(kind, precision, budget=float(argument))
        elif kind in _KINDS and not colon:
            return System(kind, precision)
    except (ValueError, TypeError) as error:
        reason = f': {error}'
    raise ValueError(
        f'a system must be one of {", ".join((*_KINDS, *mmactnn.LEVELS))}, '
        'compile:SHARE with a number up to 1, or LEVEL:JSON, each perhaps '
        f'with +{"|+".join(PRECISIONS)}; got {name!r}{reason}'
    )


def checkpoint_blocks(model):
    """Checkpoint the blocks of a model, by its own attributes if possible."""
    found, blocks = False, []
    for module in model.modules():
        if type(module).__name__ in _BLOCKS:
            blocks.append(module)
        for switch in _SWITCHES:
            if isinstance(getattr(module, switch, None), bool):
                setattr(module, switch, True)
                found = True
    if not found and not blocks:
        raise ValueError(
            f'checkpoint needs modules with one of {_SWITCHES}, or of a class '
            f'in {_BLOCKS}, got {type(model).__name__}'
        )
    for block in () if found else blocks:
        forward = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False)


class _SaveOnCPU(save_on_cpu):
    """torch's class, but reports to a meter, whose hooks it hides."""

    def __init__(self, pin_memory, meter=None):
        super().__init__(pin_memory=pin_memory)
        pack = self.pack_hook

        def count_and_pack(tensor):
            meter.observe(tensor, swapped=True)
            return pack(tensor)

        if meter is not None:
            self.pack_hook = count_and_pack
