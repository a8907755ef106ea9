"""What the processes of the tests of QSyncBatchNorm do."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmactnn import QSyncBatchNorm, RoundingGenerator, convert_model

CHANNELS = 4

# Samples of each of two processes, and what is particular.
CASES = {
    'equal': dict(samples=(2, 2)),
    'unequal': dict(samples=(1, 3)),
    'none on one': dict(samples=(4, 0)),
    'one value on each': dict(samples=(1, 1), size=(1, 1)),
    'rank 3': dict(samples=(2, 3), size=(17,)),
    'no affine': dict(samples=(1, 3), kwargs=dict(affine=False)),
    'not tracked': dict(
        samples=(1, 3), kwargs=dict(track_running_stats=False)
    ),
    'cumulative': dict(samples=(1, 3), kwargs=dict(momentum=None)),
    'frozen weight': dict(samples=(1, 3), frozen=('weight',)),
    'only bias': dict(samples=(1, 3), frozen=('weight', 'input')),
    'eval': dict(samples=(1, 3), training=False),
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
        dict[str, dict]: Results of :func:`run_case` by the case's name, and
        of :func:`_train` as ``'trained'``.
    """
    torch.manual_seed(rank)
    results = {}
    for name, case in CASES.items():
        norm = QSyncBatchNorm(
            CHANNELS, bits=8, device=device, **case.get('kwargs', {})
        )
        set_state(norm)
        start = sum(case['samples'][:rank])
        part = slice(start, start + case['samples'][rank])
        results[name] = run_case(norm, case, part)
    results['trained'] = _train(rank, device)
    return results


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
