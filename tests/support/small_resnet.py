"""A small ResNet and the handwritten digits that it learns."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from mmactnn import RoundingGenerator, convert_model

NUM_TRAIN = 1347  # of 1797


class BasicBlock(nn.Module):
    """Two convolutions around which the input is added.

    Args:
        in_channels (int): Channels of the input.
        channels (int): Channels of the output.
        stride (int, optional): Of the first convolution. Defaults to 1.
    """

    def __init__(self, in_channels, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.downsample(x))


class SmallResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels.

    Args:
        blocks (int, optional): Blocks of a stage. Defaults to 1.
        num_classes (int, optional): Defaults to 10.
    """

    def __init__(self, blocks=1, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        stages, channels = [], 16
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(BasicBlock(channels, 16 << stage, stride))
                channels = 16 << stage
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.pool(x).flatten(1))


def load_images(device='cpu'):
    """scikit-learn's digits, in an order that is always the same.

    Args:
        device (torch.device, optional): Defaults to CPU.

    Returns:
        tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: Images
        [N, 1, 8, 8] and labels [N] to train on, and to test with.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order].to(device), labels[order].to(device)
    return (
        (images[:NUM_TRAIN], labels[:NUM_TRAIN]),
        (images[NUM_TRAIN:], labels[NUM_TRAIN:]),
    )


def train_and_test(level, seed, epochs, lr=0.1, batch_size=64, device='cpu'):
    """Train from scratch.

    Args:
        level (str | dict): Level.
        seed (int): Of weights, order and rounding.
        epochs (int): Epochs.
        lr (float, optional): Learning rate to begin with. Defaults to 0.1.
        batch_size (int, optional): Defaults to 64.
        device (torch.device, optional): Defaults to CPU.

    Returns:
        float: Accuracy on the images to test with, in per cent.
    """
    (images, labels), (test_images, test_labels) = load_images(device)
    torch.manual_seed(seed)
    net = SmallResNet().to(device)
    convert_model(net, level, generator=RoundingGenerator(seed=seed))
    optimizer = torch.optim.SGD(
        net.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * (len(images) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.2
    )
    for _ in range(epochs):
        order = torch.randperm(len(images)).to(device)
        for chosen in order.split(batch_size):
            if len(chosen) < batch_size:
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            scheduler.step()
    net.eval()
    with torch.no_grad():
        correct = net(test_images).argmax(1) == test_labels
    return 100 * correct.float().mean().item()
