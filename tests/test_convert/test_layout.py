"""Layout of weights that a conversion chooses."""

import pytest
import torch
from torch import nn

from mmactnn import convert_model


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 36, 2),
    )


def is_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('level', ['L0', 'L3'])
def test_convolutions_are_laid_out(level):
    plain, net = make_net(), make_net()
    weight = net[0].weight
    report = convert_model(net, level, channels_last=True)
    assert report.channels_last == 2
    assert '2 convolutions laid out as channels_last' in str(report)
    assert net[0].weight is weight
    assert is_last(weight)
    # Depthwise.
    assert net[3].weight.stride() == plain[3].weight.stride()
    x = torch.randn(2, 3, 10, 10)
    assert is_last(net[:3](x))
    torch.testing.assert_close(net(x), plain(x))
    for found, expected in zip(net.parameters(), plain.parameters()):
        assert torch.equal(found, expected)


def test_default():
    net = make_net()
    assert convert_model(net, 'L3').channels_last == 0
    assert net[0].weight.is_contiguous()


def test_type():
    net = make_net()
    with pytest.raises(TypeError, match='channels_last must be True or False'):
        convert_model(net, 'L3', channels_last='yes')
    assert type(net[0]) is nn.Conv2d
