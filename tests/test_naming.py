"""Names inside of wrappers, and layers that stand in for their parents."""

import copy

import pytest
import torch
from mmcv.cnn import get_model_complexity_info as count_of_mmcv
from mmengine.analysis import get_model_complexity_info as count_of_mmengine
from mmengine.model import ExponentialMovingAverage
from support.small_resnet import SmallResNet
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import mmactnn
from mmactnn.modules.naming import named_modules


class Net(nn.Module):
    """Its own part of the name of what wrappers have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.module = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        return self.module(self.stem(x))


class DDP(DistributedDataParallel):
    """Without processes."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    forward = nn.Module.forward


def wrap_each(wrap):
    """As ``MMSeparateDistributedDataParallel``."""

    def wrap_parts(model):
        for name, child in list(model.named_children()):
            setattr(model, name, wrap(child))
        return DDP(model)

    return wrap_parts


@pytest.mark.parametrize(
    'wrap',
    [
        DDP,
        DataParallel,
        AveragedModel,
        ExponentialMovingAverage,
        torch.compile,
        wrap_each(DDP),
        wrap_each(checkpoint_wrapper),
        wrap_each(torch.compile),
        lambda model: DDP(torch.compile(model)),
    ],
)
def test_names_are_those_of_the_bare_model(wrap):
    bare = list(dict(Net().named_modules()))
    wrapped = wrap(Net())
    assert list(dict(named_modules(wrapped))) == bare
    rules = {'module.0': 8, 'stem': None}
    mmactnn.convert_model(wrapped, dict(base='L2', rules=rules))
    bits = {
        name: module.quantizer.bits
        for name, module in named_modules(wrapped)
        if isinstance(module, mmactnn.QuantizedLayer)
    }
    assert bits == {'stem': None, 'module.0': 8, 'module.1': 4}


@pytest.mark.parametrize('training', [True, False])
def test_operations_are_counted_as_of_torchs_layers(training):
    plain = SmallResNet().train(training)
    ours = copy.deepcopy(plain)
    mmactnn.convert_model(ours, 'L3')
    expected = count_of_mmengine(plain, (1, 32, 32))['flops']
    assert count_of_mmengine(ours, (1, 32, 32))['flops'] == expected > 0

    def state():
        return [(type(m), vars(m).get('forward')) for m in ours.modules()]

    options = dict(print_per_layer_stat=False, as_strings=False)
    before, bits = state(), mmactnn.get_precision(ours).bits
    expected = count_of_mmcv(plain, (1, 32, 32), **options)
    with mmactnn.as_parents(ours) as parents:
        assert parents is ours
        assert count_of_mmcv(ours, (1, 32, 32), **options) == expected
    assert state() == before and mmactnn.get_precision(ours).bits == bits
