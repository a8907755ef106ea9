"""A small ResNet on scikit-learn's handwritten digits."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from mmactnn import RoundingGenerator, convert_model


class Block(nn.Module):
    """Two convolutions and a way around them.

    Args:
        inputs (int): Channels of the input.
        outputs (int): Channels of the output.
        stride (int): Of the first convolution.
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        """See ``nn.Module``."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.around(x))


def make_net():
    """Three stages of 16, 32 and 64 channels.

    Returns:
        nn.Module: Takes Tensor[N, 1, 8, 8], gives Tensor[N, 10].
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def accuracy(level, seed, epochs=10):
    """Train and test.

    Args:
        level (str): Level of the network.
        seed (int): Of weights, order and rounding.
        epochs (int, optional): Defaults to 10.

    Returns:
        float: Share of the test images that are told right, in percent.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(
        len(images), generator=torch.Generator().manual_seed(0)
    )
    test, training = order[:500], order[500:]

    torch.manual_seed(seed)
    net = make_net()
    convert_model(net, level, generator=RoundingGenerator(seed))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
    )
    batches = len(training) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=epochs * batches
    )
    for _ in range(epochs):
        shuffled = training[torch.randperm(len(training))]
        for batch in shuffled[: batches * 64].view(batches, 64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        found = net.eval()(images[test]).argmax(1)
    return float((found == labels[test]).float().mean() * 100)
