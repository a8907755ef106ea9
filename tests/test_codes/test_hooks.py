"""Random bits of payloads under saved-tensor hooks."""

import pytest
import torch
from support.blocks import BLOCKS
from support.layers import assert_same_bits, rounding_variance
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mmactnn
from mmactnn import QConv2d, RoundingGenerator, convert_model, ops
from mmactnn.codes.hooks import keep_tensors
from mmactnn.codes.payload import PayloadFormat
from mmactnn.codes.quantizer import LayerQuantizer
from mmactnn.fusion import chain as chain_module


def identity(tensor):
    return tensor


def identity_that_keeps(tensor):
    return tensor


identity_that_keeps.keeps_tensors = True


def test_hooks_say_what_they_do():
    assert keep_tensors()
    with saved_tensors_hooks(identity, identity):
        assert not keep_tensors()
        with saved_tensors_hooks(identity_that_keeps, identity):
            assert keep_tensors()
        assert not keep_tensors()
    assert keep_tensors()


def test_hooks_of_a_meter_keep_tensors():
    found = []
    model = torch.nn.Sequential(QConv2d(3, 4, 1))
    convert_model(model, 'L2')

    def look(module, args):
        payload = module[0].quantizer.pack(args[0])
        found.append(payload.format.saves_bits)

    model.register_forward_pre_hook(look)
    with mmactnn.measure_activations(model):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert found == [False]


def test_hooks_of_swapping_keep_tensors():
    assert mmactnn.offload.engine.SwapEngine.pack.keeps_tensors


class TestSavedBits:
    @pytest.mark.parametrize('rounding', ops.ROUNDINGS)
    def test_no_tensor_more_without_hooks(self, rounding):
        quantizer = LayerQuantizer(2, rounding=rounding)
        x = torch.randn(2, 512)
        assert len(quantizer.pack(x).tensors) == 2
        with saved_tensors_hooks(identity, identity):
            payload = quantizer.pack(x)
        saved = 0 if rounding == 'stochastic' else 1
        assert len(payload.tensors) == 2 + saved
        assert len(payload.operands) == 2
        assert payload.nbytes == quantizer.pack(x).nbytes

    @pytest.mark.parametrize('counts', [False, True])
    def test_those_of_the_tensors_are_decoded_with(self, counts, device):
        """Also where a graph counts on the device."""
        x = torch.randn(3, 512, device=device)
        payloads = []
        for seed in (3, 2**64 - 5):
            counter = None
            if counts:
                counter = torch.tensor([seed % 7], device=device)
            draw = seed, 2**63 + seed, counter
            drawn = ops.DrawnBits.of('rotated', *draw)
            with saved_tensors_hooks(identity, identity):
                format = PayloadFormat.of(x, 2, 256, drawn=drawn)
            codes = ops.quantize(
                x,
                2,
                seed=draw[0],
                offset=draw[1],
                offset_tensor=counter,
                rotated=True,
            )
            payloads.append(format.make(*codes))
        first, second = payloads
        assert len(first.tensors) == 3 + counts
        # On the host, where the op needs it.
        assert not first.tensors[2].is_cuda
        taken = first.format.payload(*second.tensors)
        assert_same_bits(taken.unpack(), second.unpack())
        assert_same_bits(taken.unpack(1, 3), second.unpack(1, 3))
        assert not torch.equal(taken.unpack(), first.unpack())
        for found, tensor in zip(taken.tensors, second.tensors):
            assert torch.equal(found, tensor)

    def test_whatever_the_default_device(self):
        quantizer = LayerQuantizer(2)
        x = torch.randn(2, 512)
        with torch.device('meta'), saved_tensors_hooks(identity, identity):
            payload = quantizer.pack(x)
        payload.format.payload(*payload.tensors).unpack()


@pytest.mark.parametrize('rounding', ops.ROUNDINGS)
@pytest.mark.parametrize('reentrant', [False, True])
def test_variance_in_a_checkpointed_block(reentrant, rounding, device):
    conv = QConv2d(4, 6, 1, bias=False)
    convert_model(
        nn.Sequential(conv),
        dict(base='L2', conv=2, rounding=rounding),
        generator=RoundingGenerator(seed=1),
    )
    conv.to(device)
    x = torch.randn(3, 4, 8, 8, device=device, requires_grad=True)
    grad = torch.randn(3, 6, 8, 8, device=device)
    count, draws = 512, []
    for _ in range(count):
        output = checkpoint(conv, x, use_reentrant=reentrant)
        # torch.autograd.grad does not run reentrant blocks again.
        conv.weight.grad = None
        output.backward(grad)
        draws.append(conv.weight.grad.flatten().double())
    draws = torch.stack(draws)
    payload = conv.quantizer.pack(x.detach())
    noise = rounding_variance(x, payload)
    expected = torch.einsum('nohw,nchw->oc', grad.double() ** 2, noise)
    ratio = draws.var(0) / expected.flatten()
    # A ratio is a chi-squared variable of 511 degrees over 511. The closed
    # form of a rotation is for normal coefficients.
    assert abs(ratio.mean() - 1) < (0.1 if rounding == 'rotated' else 0.05)
    exact = torch.nn.grad.conv2d_weight(x, conv.weight.shape, grad)
    z = draws.mean(0) - exact.flatten().double()
    z /= (expected.flatten() / count).sqrt()
    assert z.abs().max() < 4.5


# Each with other payloads: plain, split and zeroed ones, those of chains and
# of single layers, masks in codes, derivatives.
MODELS = {
    'block': lambda: BLOCKS['mmdet basic'][0](),
    'layers': lambda: nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.GroupNorm(2, 16),
        nn.Conv2d(16, 16, 1),
    ),
    'relu': lambda: BLOCKS['Sequential'][0](),
}


@pytest.mark.parametrize('chained', [False, True])
@pytest.mark.parametrize('rounding', ops.ROUNDINGS)
@pytest.mark.parametrize('name', MODELS)
def test_gradients_are_those_of_the_second_pass(
    name, rounding, chained, device, monkeypatch
):
    """Bit for bit those of an ordinary pass with its random bits."""
    if not chained:
        monkeypatch.setattr(chain_module, '_MAX_BYTES', 0)
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    generator = RoundingGenerator(seed=1)
    # No bits that depend on earlier calls.
    level = dict(base='L2', conv=2, norm=2, rounding=rounding)
    convert_model(model, level, generator=generator)
    x = torch.randn(2, 16, 16, 16, device=device)

    def gradients(hooks):
        model.zero_grad()
        own = x.clone().requires_grad_()
        hooks(own).square().sum().backward()
        return [own.grad, *(p.grad for p in model.parameters())]

    generator.seek(0)
    expected = gradients(model)
    taken = generator.state_dict()['offset']
    assert taken > 0
    # The first forward pass takes other bits.
    generator.seek(1000)
    seen = []

    def again(own):
        if seen:
            generator.seek(0)
        seen.append(own)
        return model(own)

    found = gradients(lambda own: checkpoint(again, own, use_reentrant=False))
    assert len(seen) == 2
    for grad, wanted in zip(found, expected):
        assert_same_bits(grad, wanted)
    generator.seek(0)
    with save_on_cpu():
        found = gradients(model)
    for grad, wanted in zip(found, expected):
        assert_same_bits(grad, wanted)
