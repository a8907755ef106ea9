"""MMDetection's own class of an adaptive pool."""

import torch
from mmdet.models.layers.brick_wrappers import AdaptiveAvgPool2d
from support.layers import assert_same_bits, gradients
from torch import nn

from mmactnn import QAdaptiveAvgPool2d, convert_model, revert_model


def test_converted_and_back():
    model = nn.Sequential(AdaptiveAvgPool2d(3))
    x = torch.randn(2, 4, 9, 7)
    grad_output = torch.randn(2, 4, 3, 3)
    expected = gradients(model[0], x, grad_output)
    convert_model(model, 'L2')
    assert type(model[0]) is QAdaptiveAvgPool2d
    found = gradients(model[0], x, grad_output)
    for key, value in expected.items():
        assert_same_bits(found[key], value)
    revert_model(model)
    assert type(model[0]) is AdaptiveAvgPool2d
