"""MMCV's deformable attention, adapted, against itself."""

import copy

import pytest
import torch
from support.layers import assert_same_bits, relative_error
from support.pairs import in_turn

from mmactnn import convert_model, measure_activations, revert_model

mmcv_attention = pytest.importorskip('mmcv.ops.multi_scale_deform_attn')

LEVEL = dict(base='L3', attention=8, conv=8, adaptive=False)
SHAPES = torch.tensor([[6, 5], [3, 2]])
KEYS = 36


def make(**options):
    torch.manual_seed(0)
    module = mmcv_attention.MultiScaleDeformableAttention(
        16, 4, 2, 3, dropout=0.0, **options
    ).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    twin = copy.deepcopy(module)
    report = convert_model(twin, LEVEL)
    assert [a.layers for a in report.adapted] == [('sampling',)]
    return module, twin


def arguments(coordinates=2, **changes):
    call = dict(
        query=torch.randn(7, 2, 16),
        value=torch.randn(KEYS, 2, 16),
        query_pos=torch.randn(7, 2, 16),
        key_padding_mask=torch.rand(2, KEYS) > 0.8,
        reference_points=torch.rand(2, 7, 2, coordinates) * 0.8 + 0.1,
        spatial_shapes=SHAPES,
        level_start_index=torch.tensor([0, 30]),
        unused=None,
    )
    return dict(call, **changes)


def results(module, call):
    call = dict(call)
    inputs = {
        name: call[name].detach().requires_grad_()
        for name in ('query', 'value', 'reference_points')
        if call[name] is not None
    }
    output = module(**dict(call, **inputs))
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    used = [*inputs.values(), *module.parameters()]
    return output.detach(), torch.autograd.grad(output, used, weights)


CALLS = dict(
    points=dict(),
    boxes=dict(coordinates=4),
    itself=dict(query=torch.randn(KEYS, 2, 16), value=None, query_pos=None),
    alone=dict(key_padding_mask=None, query_pos=None, identity=None),
)


@in_turn(name=tuple(CALLS))
def test_against_mmcv(name):
    module, twin = make()
    call = arguments(**CALLS[name])
    if name == 'itself':
        call['reference_points'] = torch.rand(2, KEYS, 2, 2)
    output, expected = results(module, call)
    found, gradients = results(twin, call)
    torch.testing.assert_close(found, output)
    for a, b in zip(gradients, expected, strict=True):
        assert relative_error(a, b) < 0.05


def test_keeps_less():
    module, twin = make(batch_first=True)
    convert_model(twin, 'L3')
    call = arguments(
        query=torch.randn(4, 200, 16),
        value=torch.randn(4, KEYS, 16),
        query_pos=None,
        key_padding_mask=None,
        reference_points=torch.rand(4, 200, 2, 2),
    )
    call['query'].requires_grad_()
    call['value'].requires_grad_()
    with measure_activations(twin) as meter:
        twin(**call)
    # Four heads, two levels and three points.
    locations = 4 * 200 * 4 * 2 * 3 * 2
    assert meter.exact_bytes > locations * 4
    assert meter.saved_bytes < locations * 2 * 1.7


def test_far_locations_sample_nothing():
    module, twin = make()
    call = arguments(reference_points=torch.full((2, 7, 2, 2), 1e4))
    output, expected = results(module, call)
    found, gradients = results(twin, call)
    assert_same_bits(found, output)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert_same_bits(gradients[1], expected[1])


def test_exact():
    module, twin = make()
    call = arguments()
    assert_same_bits(twin.eval()(**call), module.eval()(**call))
    convert_model(twin.train(), 'L0')
    output, expected = results(module.train(), call)
    found, gradients = results(twin, call)
    torch.testing.assert_close(found, output)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)
    revert_model(twin)
    assert type(twin) is type(module)
    assert twin.state_dict().keys() == module.state_dict().keys()


def test_wrong_points():
    _, twin = make()
    call = arguments(coordinates=3)
    call['query'].requires_grad_()
    with pytest.raises(ValueError, match='2 or 4 coordinates, got 3'):
        twin(**call)
