"""Functions for the processes of tests of QSyncBatchNorm."""

import copy

import torch
import torch.distributed as dist
from mmcv.ops import SyncBatchNorm as MMSyncBatchNorm
from mmengine.model.utils import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmactnn import (
    QSyncBatchNorm,
    RoundingGenerator,
    convert_model,
    revert_model,
)
from mmactnn.autograd.sync_batch_norm import sync_batch_norm
from support.layers import gradients

CHANNELS = 4

# Samples of each of two processes, and what is particular.
CASES = {
    'equal': dict(samples=(2, 2)),
    'unequal': dict(samples=(1, 3)),
    'none on one': dict(samples=(4, 0)),
    'one value on each': dict(samples=(1, 1), size=(1, 1)),
    'rank 2': dict(samples=(9, 20), size=()),
    'rank 3': dict(samples=(2, 3), size=(17,)),
    'rank 5': dict(samples=(2, 1), size=(3, 2, 5)),
    'no affine': dict(samples=(1, 3), kwargs=dict(affine=False)),
    'not tracked': dict(
        samples=(1, 3), kwargs=dict(track_running_stats=False)
    ),
    'cumulative': dict(samples=(1, 3), kwargs=dict(momentum=None)),
    'frozen weight': dict(samples=(1, 3), frozen=('weight',)),
    'only bias': dict(samples=(1, 3), frozen=('weight', 'input')),
    'eval': dict(samples=(1, 3), training=False),
    'float16': dict(samples=(1, 3), dtype=torch.float16),
    'bfloat16': dict(samples=(1, 3), dtype=torch.bfloat16),
}


def make_data(case):
    """Two batches of all processes, and the gradients of their outputs.

    Args:
        case (dict): One of CASES.

    Returns:
        list[tuple[Tensor, Tensor]]: Input and gradient of each step, on the
        CPU, the same in every process.
    """
    generator = torch.Generator().manual_seed(7)
    size = (sum(case['samples']), CHANNELS, *case.get('size', (6, 7)))
    dtype = case.get('dtype', torch.float32)

    def draw():
        return torch.randn(size, generator=generator)

    return [((draw() * 2 + 0.5).to(dtype), draw().to(dtype)) for _ in '12']


def set_state(norm):
    """Give a layer parameters and buffers that no layer starts with.

    Args:
        norm (_BatchNorm): The layer.
    """
    with torch.no_grad():
        if norm.affine:
            norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0, 0.1]))
            norm.bias.copy_(torch.tensor([0.1, -0.2, 0.0, 1.0]))
        if norm.track_running_stats:
            norm.running_mean.copy_(torch.tensor([0.2, 0.0, -0.4, 1.0]))
            norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))


def run_case(norm, case, part, dtype=None):
    """Two training steps' forward and backward passes.

    Args:
        norm (_BatchNorm): The layer.
        case (dict): One of CASES.
        part (slice): The samples of this process.
        dtype (torch.dtype, optional): Of the input. Defaults to the case's.

    Returns:
        dict: ``outputs`` and ``inputs`` (gradients) of the steps, and the
        accumulated gradients and the buffers of the layer by name.
    """
    norm.train(case.get('training', True))
    frozen = case.get('frozen', ())
    for name in set(frozen) - {'input'}:
        getattr(norm, name).requires_grad_(False)
    device = next((t.device for t in norm.state_dict().values()), None)
    outputs, inputs = [], []
    for x, grad_output in make_data(case):
        x = x[part].to(device, dtype).requires_grad_('input' not in frozen)
        output = norm(x)
        output.backward(grad_output[part].to(device, dtype))
        outputs.append(output.detach().cpu())
        inputs.append(x.grad)
    tensors = dict(norm.named_buffers())
    tensors.update((n, p.grad) for n, p in norm.named_parameters())
    return dict(
        outputs=outputs,
        inputs=[x if x is None else x.cpu() for x in inputs],
        **{n: t if t is None else t.cpu() for n, t in tensors.items()},
    )


def run_all(rank, device):
    """All cases in one process of two.

    Args:
        rank (int): Rank of this process.
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        dict[str, dict]: Results of :func:`run_case` by the case's name, at 8
        bits as ``'coded'`` and at level L0 as ``'exact'``, and those of the
        other functions here.
    """
    torch.manual_seed(rank)
    results = dict(coded={}, exact={})
    for name, case in CASES.items():
        norm = QSyncBatchNorm(
            CHANNELS, bits=8, device=device, **case.get('kwargs', {})
        )
        set_state(norm)
        start = sum(case['samples'][:rank])
        part = slice(start, start + case['samples'][rank])
        exact = copy.deepcopy(norm)
        convert_model(exact, 'L0')
        results['coded'][name] = run_case(norm, case, part)
        results['exact'][name] = run_case(exact, case, part)
    results['trained'] = _train(rank, device)
    results['no samples'] = _no_samples(device)
    results['without grad'] = _without_grad(rank, device)
    results['mmengine'] = {
        implementation: _from_mmengine(rank, implementation)
        for implementation in ('torch', 'mmcv')
    }
    return results


def _no_samples(device):
    """Gradient and buffers after a batch of nothing on any process."""
    norm = QSyncBatchNorm(CHANNELS, device=device)
    set_state(norm)
    norm(torch.zeros(0, CHANNELS, 3, 3, device=device)).sum().backward()
    tensors = dict(norm.named_buffers(), grad=norm.weight.grad)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _without_grad(rank, device):
    """Running mean after a batch that needs no gradient, and its mean."""
    norm = QSyncBatchNorm(CHANNELS, momentum=1.0, device=device)
    x = torch.arange(2.0, device=device)[rank].expand(3, CHANNELS, 2, 2)
    with torch.no_grad():
        norm(x)
    return norm.running_mean.cpu()


def _from_mmengine(rank, implementation):
    """A model through MMEngine's conversion, ours, and back.

    Returns:
        dict: Names of the classes, the running mean after a batch whose
        values are the rank, and the attributes that the way back leaves.
    """
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=1.0))
    model = convert_sync_batchnorm(model, implementation)
    source, attributes = type(model[0]), set(vars(model[0]))
    convert_model(model)
    names = [source.__module__, type(model[0]).__name__]
    x = torch.full((2, CHANNELS, 3, 3), float(rank), requires_grad=True)
    model(x).sum().backward()
    mean = model[0].running_mean
    revert_model(model)
    return dict(
        names=names,
        mean=mean,
        reverted=type(model[0]) is source,
        left=set(vars(model[0])) ^ attributes,
    )


class _Wrapper(DistributedDataParallel):
    """Takes models with SyncBatchNorm on the CPU, too."""

    def _passing_sync_batchnorm_handle(self, module):
        pass


def _train(rank, device):
    """Weights and buffers after three steps of a converted DDP model."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.SyncBatchNorm(4), nn.ReLU()
    ).to(device)
    model = _Wrapper(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    # After wrapping, as the hook does; every rank rounds differently.
    generator = RoundingGenerator(seed=1, stream=rank)
    report = convert_model(model, 'L3', generator=generator)
    assert len(report.converted) == 3
    torch.manual_seed(rank + 1)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, device=device)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {n: t.cpu() for n, t in model.module.state_dict().items()}


def run_in_one(rank, device):
    """All that is of interest in a group of one process.

    Args:
        rank (int): Of this process.
        device (str): ``'cpu'`` or ``'cuda'``.

    Returns:
        dict: Results of each part.
    """
    return dict(
        alone={level: _alone(level, device) for level in ('L0', 'L3')},
        collectives=_collectives(device),
        reports={mode: _report_of_mmcv(mode) for mode in ('default', 'N')},
    )


def _alone(level, device):
    """A layer in a group of one process, and batch normalisation.

    Returns:
        list[dict]: Output, gradients and running mean of each.
    """
    found = []
    for norm in (QSyncBatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS)):
        if isinstance(norm, QSyncBatchNorm):
            convert_model(norm, level)
        torch.manual_seed(0)
        x = torch.randn(3, CHANNELS, 5, 6).to(device)
        norm.to(device)
        results = gradients(norm, x, torch.randn_like(x))
        results['running_mean'] = norm.running_mean
        found.append({n: t.cpu() for n, t in results.items()})
    return found


def _collectives(device):
    """Reference: one process, and batch normalisation in float64.

    A layer that is alone leaves the collectives out.

    Returns:
        list[dict]: Output, gradients and running mean of each.
    """
    norms = [
        QSyncBatchNorm(CHANNELS, bits=8).to(device),
        nn.BatchNorm2d(CHANNELS, dtype=torch.float64),
    ]
    torch.manual_seed(0)
    x, grad_output = torch.randn(2, 3, CHANNELS, 5, 6)
    found = []
    for norm in norms:
        set_state(norm)
        running = norm.running_mean, norm.running_var
        input = x.to(norm.weight, copy=True).requires_grad_()
        if isinstance(norm, QSyncBatchNorm):
            output = sync_batch_norm(
                input,
                norm.weight,
                norm.bias,
                *running,
                norm.momentum,
                norm.eps,
                dist.group.WORLD,
                norm.quantizer,
            )
        else:
            output = norm(input)
        output.backward(grad_output.to(output))
        tensors = dict(output=output.detach(), input=input.grad)
        tensors.update(weight=norm.weight.grad, bias=norm.bias.grad)
        tensors.update(running_mean=running[0], running_var=running[1])
        found.append({n: t.cpu() for n, t in tensors.items()})
    return found


def _report_of_mmcv(mode):
    """Report of a conversion on MMCV's layer with a ``stats_mode``."""
    norm = MMSyncBatchNorm(CHANNELS, stats_mode=mode)
    return str(convert_model(nn.Sequential(norm)))
