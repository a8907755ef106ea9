"""MMDetection's RetinaNet, stock and compressed."""

import pytest
import torch
from mmcv.ops import sigmoid_focal_loss
from mmengine.model.utils import revert_sync_batchnorm
from support.layers import (
    assert_same_bits,
    exact_numerics,
    relative_error,
    saved_tensors,
)
from support.retinanet import (
    build,
    compute_loss,
    enliven,
    make_config,
    train,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmactnn import (
    QBatchNorm2d,
    QConv2d,
    QReLU,
    convert_model,
    measure_activations,
    revert_model,
)


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


@pytest.fixture
def device(device):
    """Devices for which MMCV has the op that RetinaNet trains with."""
    try:
        sigmoid_focal_loss(
            torch.zeros(1, 1, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )
    except RuntimeError as error:
        if device.type == 'cuda':
            pytest.skip(f'MMCV was built without its CUDA ops: {error}')
        # On a CPU, MMDetection does not use it.
    return device


def stock(device, **backbone):
    return enliven(build(make_config(**backbone), device))


# Level at which gradients of losses are exact.
EXACT_LOSSES = dict(base='L3', rules={'*.losses_of_outputs': None})


def converted(device, level='L3', **backbone):
    """Q layers from the config, the rest by conversion, as the hook does."""
    model = enliven(build(make_config(compressed=True, **backbone), device))
    convert_model(model, level)
    return model


def gradients(model):
    model.zero_grad()
    compute_loss(model).backward()
    return {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_state(model, other):
    expected = other.state_dict()
    assert list(model.state_dict()) == list(expected)
    for key, value in model.state_dict().items():
        assert_same_bits(value, expected[key])


@pytest.mark.parametrize('norm_eval', [True, False])
def test_exact_level_is_the_stock_model(norm_eval, device):
    backbone = dict(norm_eval=norm_eval, frozen_stages=-1)
    ours = converted(device, 'L0', **backbone)
    reference = stock(device, **backbone)
    before = reference.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    assert train(ours) == train(reference)
    assert_same_state(ours, reference)
    for name, parameter in ours.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_initial_weights(device):
    """init_cfg finds our layers, and draws the same numbers for them."""
    ours = build(make_config(compressed=True), device)
    assert_same_state(ours, build(make_config(), device))


def test_every_layer_is_converted(device):
    model = converted(device)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert type(module) is QConv2d, name
        if isinstance(module, _BatchNorm):
            assert type(module) is QBatchNorm2d, name
        if isinstance(module, nn.ReLU):
            assert type(module) is QReLU, name
    revert_model(model)
    reference = stock(device)
    assert [type(m) for m in model.modules()] == [
        type(m) for m in reference.modules()
    ]


@pytest.mark.parametrize('level', ['L2', 'L3'])
def test_trains(level, device):
    model = converted(device, level, frozen_stages=-1, norm_eval=False)
    reference = stock(device, frozen_stages=-1, norm_eval=False)
    # Noise of the gradients is all that differs, but for what fusing rounds:
    # not the first loss.
    found, expected = train(model), train(reference)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1:] != expected[1:]
    # A few steps at a high rate: what little noise there is grows.
    assert found == pytest.approx(expected, rel=0.25)


def test_gradients(device):
    """More bits, less noise, for all layers that keep codes."""
    exact = gradients(stock(device))
    errors = []
    for bits in (2, 4, 8):
        model = stock(device)
        level = dict(base='L2', conv=bits, norm=bits, fuse=False)
        # Losses keep gradients at bits of their own.
        convert_model(model, level, exclude=['Losses'])
        found = gradients(model)
        assert found.keys() == exact.keys()
        errors.append(
            sum(relative_error(found[n], exact[n]) for n in exact) / len(exact)
        )
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize('to_converted', [True, False])
def test_checkpoints(to_converted, device):
    source, target = stock(device), converted(device)
    if not to_converted:
        source, target = target, source
    train(source, steps=1)
    assert any(
        not torch.equal(value, target.state_dict()[key])
        for key, value in source.state_dict().items()
    )
    target.load_state_dict(source.state_dict(), strict=True)
    assert_same_state(target, source)
    source.eval(), target.eval()
    x = torch.randn(1, 3, 64, 64, device=device)
    with torch.no_grad():
        outputs = zip(target(x), source(x))
    for found, expected in outputs:
        for a, b in zip(found, expected):
            assert_same_bits(a, b)


@pytest.mark.parametrize('norm_eval', [True, False])
def test_memory(norm_eval, device):
    """At most an eighth of the stock model's, by two counts."""
    backbone = dict(frozen_stages=-1, norm_eval=norm_eval)
    reference = stock(device, **backbone)
    with measure_activations(reference) as meter:
        compute_loss(reference).backward()
    exact_bytes = meter.saved_bytes

    model = converted(device, **backbone)
    with measure_activations(model) as meter:
        compute_loss(model).backward()
    assert meter.layers_ratio >= 8
    assert meter.exact_bytes == pytest.approx(exact_bytes, rel=0.02)

    own = {
        t.untyped_storage().data_ptr()
        for t in (*model.parameters(), *model.buffers())
    }
    with saved_tensors() as saved:
        loss = compute_loss(model)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in saved
    }
    counted = sum(size for key, size in storages.items() if key not in own)
    assert loss.requires_grad
    assert meter.saved_bytes == pytest.approx(counted, rel=0.02)


class TestFrozenStages:
    def test_keep_nothing(self, device):
        # The official recipe: stem and first stage frozen, norms in eval.
        model = converted(device)
        backbone = model.backbone
        assert backbone.frozen_stages == 1 and backbone.norm_eval
        with saved_tensors() as saved:
            x = backbone.relu(
                backbone.bn1(
                    backbone.conv1(torch.randn(1, 3, 64, 64, device=device))
                )
            )
            x = backbone.layer1(backbone.maxpool(x))
        assert not saved and not x.requires_grad
        with saved_tensors() as saved:
            backbone.layer2(x)
        assert any(tensor.dtype == torch.uint8 for tensor in saved)

    def test_gradients(self, device):
        found, expected = (
            gradients(converted(device, EXACT_LOSSES)),
            gradients(stock(device)),
        )
        assert found.keys() == expected.keys()
        assert 'backbone.layer1.0.conv1.weight' not in found
        assert 'backbone.layer2.0.bn1.weight' in found

    def test_statistics_stay(self, device):
        # norm_eval: train() puts the normalisation layers into eval mode.
        model = converted(device)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        before = [norm.running_var.clone() for norm in norms]
        assert not any(norm.training for norm in norms)
        train(model, steps=2)
        for norm, var in zip(norms, before):
            assert_same_bits(norm.running_var, var)

    def test_nothing_on_the_way_is_rounded(self, device):
        """Every bias gets its exact gradient, down to the first stages."""
        found, expected = (
            gradients(converted(device, EXACT_LOSSES)),
            gradients(stock(device)),
        )
        biases = [name for name in expected if name.endswith('bias')]
        assert 'backbone.layer2.0.bn1.bias' in biases
        for name in biases:
            assert relative_error(found[name], expected[name]) < 1e-4
        name = 'backbone.layer2.0.conv1.weight'
        assert relative_error(found[name], expected[name]) > 0.01


class TestCheckpointedBlocks:
    """``with_cp=True``: blocks are recomputed in the backward pass."""

    def test_exact_level(self, device):
        backbone = dict(with_cp=True, frozen_stages=-1, norm_eval=False)
        ours = converted(device, 'L0', **backbone)
        reference = stock(device, **backbone)
        assert train(ours, 3) == train(reference, 3)
        assert_same_state(ours, reference)

    def test_trains(self, device):
        backbone = dict(frozen_stages=-1, norm_eval=False)
        model = converted(device, 'L3', with_cp=True, **backbone)
        found = train(model)
        assert found == pytest.approx(
            train(stock(device, **backbone)), rel=0.15
        )

    def test_memory(self, device):
        def measure(with_cp):
            model = converted(
                device,
                EXACT_LOSSES,
                with_cp=with_cp,
                frozen_stages=-1,
                norm_eval=False,
            )
            with measure_activations(model) as meter:
                compute_loss(model).backward()
            return meter

        assert measure(True).saved_bytes != measure(False).saved_bytes
        # Inside of the blocks nothing counts as compressed.
        ours, without = measure(True), measure(False)
        assert ours.layers_exact_bytes < without.layers_exact_bytes

        reference = stock(
            device, with_cp=True, frozen_stages=-1, norm_eval=False
        )
        with measure_activations(reference) as meter:
            compute_loss(reference).backward()
        assert ours.exact_bytes == pytest.approx(meter.saved_bytes, rel=0.02)


def test_sync_norm_of_one_process(device):
    """Layers that the runner makes from SyncBN are compressed, too."""
    model = stock(device, norm_cfg=dict(type='SyncBN'), norm_eval=False)
    model = revert_sync_batchnorm(model)
    report = convert_model(model)
    norms = [c for c in report.converted if c.source == '_BatchNormXd']
    assert {c.target for c in norms} == {'QBatchNorm'}
    assert len(norms) == 20
    assert train(model, steps=2) == pytest.approx(
        train(stock(device, norm_eval=False), steps=2), rel=0.1
    )
