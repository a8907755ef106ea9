"""Networks and training for tests of adaptive precision."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmactnn import RoundingGenerator, convert_model, get_precision


class Net(nn.Module):
    """Convolutions of unequal weight, a reused one and an unused one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.unused = nn.Conv2d(8, 8, 1)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        x = self.frozen(x)
        for _ in range(2):  # as a head over two levels of a pyramid
            x = self.pool(self.body(x))
        return self.fc(x.mean((2, 3)))


def make_net(level='L3', seed=0, **kwargs):
    """A converted network in training mode, of layers that are not fused.

    Args:
        level (str | dict | Level, optional): Defaults to ``'L3'``.
        seed (int, optional): Of the weights. Defaults to 0.
        **kwargs: For ``convert_model``.

    Returns:
        nn.Module: The network.
    """
    torch.manual_seed(seed)
    net = Net()
    level = level if isinstance(level, dict) else dict(base=level)
    level = dict(fuse=False) | level
    kwargs.setdefault('generator', RoundingGenerator(seed=5))
    convert_model(net, level, **kwargs)
    return net


def batch(step, size=4, device='cpu'):
    """Images of different contrast.

    Args:
        step (int): Which batch.
        size (int, optional): Images. Defaults to 4.
        device (torch.device, optional): Defaults to CPU.

    Returns:
        Tensor[N, 3, 16, 16]: The images.
    """
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    scale = torch.logspace(-0.3, 0.3, size).view(-1, 1, 1, 1)
    return (images * scale).to(device)


def train(net, steps, device='cpu', before=None):
    """Some steps of SGD.

    Args:
        net (nn.Module): The network.
        steps (Iterable[int]): Which batches.
        device (torch.device, optional): Defaults to CPU.
        before (Callable, optional): Called with each step first.

    Returns:
        list[float]: Losses.
    """
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=0.05
    )
    losses = []
    for step in steps:
        if before is not None:
            before(step)
        optimizer.zero_grad()
        loss = net(batch(step, device=device)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


def train_distributed(rank, device):
    """Train on other data in every process; importable by name.

    Args:
        rank (int): Which process.
        device (str): Where.

    Returns:
        dict: Bits and history of the process.
    """
    level = dict(use_gradient=True)
    net = make_net(level, num_samples=16).to(device)
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    precision = get_precision(net)

    def before(step):
        start = 8 * (step % 2) + 4 * rank
        precision.set_samples(range(start, start + 4))

    train(wrapped, [10 * rank + s for s in range(6)], device, before)
    precision.end_pass()
    state = precision.state_dict()
    return dict(bits=state['bits'], history=state['history'])


def train_apart(rank, device):
    """Let processes call adaptive layers in different steps.

    Args:
        rank (int): Which process.
        device (str): Where.

    Returns:
        dict: Bits and number of passes of the process.
    """
    net = make_net().to(device)
    precision = get_precision(net)
    for step in range(8):
        precision.begin_pass()
        if rank == 0 or step % 3:
            net(batch(10 * rank + step, device=device)).sum().backward()
        precision.end_pass()
    return dict(bits=precision.bits, passes=precision._passes)
