"""Mixed precision: kept tensors, and overflows."""

import pytest
import torch
from support.layers import assert_same_bits, saved_tensors
from support.pairs import in_turn
from support.precision_cases import batch, make_net, train
from support.small_resnet import SmallResNet
from support.toy import ITERATIONS, make_runner
from torch import nn

import mmactnn.hooks  # noqa: F401  (registers ActNNHook)
from mmactnn import (
    QuantizedLayer,
    RoundingGenerator,
    convert_model,
    get_precision,
    measure_activations,
)

IMAGES = (8, 1, 16, 16)


def make_resnet(level, device):
    torch.manual_seed(0)
    net = SmallResNet().to(device)
    if level is not None:
        generator = RoundingGenerator(seed=1)
        convert_model(net, level, generator=generator)
    return net


def lower_dtypes(device):
    """Dtypes of autocast on a device."""
    return [torch.bfloat16, torch.float16][: 2 if device.type == 'cuda' else 1]


class TestRunner:
    @pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
    @pytest.mark.parametrize('level', ['L0', 'L3'])
    def test_trains(self, level, dtype, tmp_path, monkeypatch):
        if not torch.cuda.is_available():
            if dtype == 'float16':
                pytest.skip('no GPU is available, and float16 needs one')
            # The wrapper refuses the CPU, where autocast works all the same
            # and the scaler of losses does nothing.
            monkeypatch.setattr(
                'mmengine.optim.optimizer.amp_optimizer_wrapper'
                '.is_cuda_available',
                lambda: True,
            )
        dtypes = []
        runner = make_runner(
            tmp_path,
            dict(type='ActNNHook', level=level),
            dict(type='RecordingHook'),
            epochs=4,
            optim_wrapper=dict(
                type='AmpOptimWrapper',
                dtype=dtype,
                optimizer=dict(type='SGD', lr=0.1),
            ),
        )
        runner.model.body[1].register_forward_hook(
            lambda module, args, out: dtypes.append(out.dtype)
        )
        runner.train()
        assert set(dtypes) == {getattr(torch, dtype)}
        (hook,) = (
            h for h in runner.hooks if type(h).__name__ == 'RecordingHook'
        )
        losses = list(hook.losses.values())
        assert len(losses) == 4 * ITERATIONS
        assert sum(losses[-ITERATIONS:]) < sum(losses[:ITERATIONS])
        for parameter in runner.model.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.isfinite().all()
        assert isinstance(runner.model.head, QuantizedLayer)


class TestMemory:
    @pytest.mark.parametrize(
        ('level', 'least'), [('L1', 1.3), ('L2', 3.5), ('L3', 6)]
    )
    def test_against_exact_mixed_precision(self, level, least, device):
        x = torch.randn(IMAGES, device=device)
        for dtype in lower_dtypes(device):
            plain, ours = make_resnet(None, device), make_resnet(level, device)
            with torch.autocast(device.type, dtype):
                with measure_activations(plain) as expected:
                    plain(x)
                with measure_activations(ours) as meter:
                    ours(x)
            assert meter.exact_bytes == pytest.approx(
                expected.saved_bytes, rel=0.02
            )
            assert expected.saved_bytes / meter.saved_bytes > least

    @pytest.mark.parametrize('level', ['L2', 'L3'])
    def test_as_little_as_without(self, level, device):
        """Codes are as large, whatever they are codes of."""
        x = torch.randn(IMAGES, device=device)
        saved = []
        for enabled in (False, True):
            net = make_resnet(level, device)
            with torch.autocast(device.type, torch.bfloat16, enabled):
                with measure_activations(net) as meter:
                    net(x)
            saved.append(meter.saved_bytes)
        assert saved[1] == pytest.approx(saved[0], rel=0.02)

    def test_no_full_copies_are_kept(self, device):
        net = make_resnet('L3', device)
        own = {p.data_ptr() for p in net.parameters()}
        x = torch.randn(IMAGES, device=device)
        for dtype in lower_dtypes(device):
            with saved_tensors() as saved, torch.autocast(device.type, dtype):
                net(x)
            floats = [
                t.numel()
                for t in saved
                if t.is_floating_point() and t.data_ptr() not in own
            ]
            # Ranges, and the input of the last layer's loss: none is as
            # large as the smallest input of a convolution.
            assert max(floats) < IMAGES[0] * 64 * 4 * 4
            assert sum(floats) < 0.1 * sum(t.numel() for t in saved)


LAYERS = {
    'conv': (lambda: nn.Conv2d(3, 4, 3), (4, 3, 8, 8)),
    'transposed': (lambda: nn.ConvTranspose2d(3, 4, 3), (4, 3, 8, 8)),
    'linear': (lambda: nn.Linear(6, 5), (4, 6)),
    'linear of sequences': (lambda: nn.Linear(6, 5), (4, 7, 6)),
    'batch norm': (lambda: nn.BatchNorm2d(3), (4, 3, 8, 8)),
    'group norm': (lambda: nn.GroupNorm(1, 3), (4, 3, 8, 8)),
    'sync norm': (lambda: nn.SyncBatchNorm(3), (4, 3, 8, 8)),
}
LEVELS = {
    'L2': 'L2',
    'L3': 'L3',
    'per sample': dict(conv=2.5, norm=2.5),
    'gradients': dict(conv=2.5, norm=2.5, use_gradient=True),
}


class TestOverflow:
    @pytest.mark.parametrize('name', LAYERS)
    @in_turn(level=tuple(LEVELS), value=['inf', '-inf', 'nan'])
    def test_reaches_the_gradient(self, name, level, value, device):
        make, shape = LAYERS[name]
        net = nn.Sequential(make()).to(device)
        generator = RoundingGenerator(seed=1)
        options = dict(generator=generator, num_samples=4)
        convert_model(net, LEVELS[level], **options)
        x = torch.randn(shape, device=device)

        def run(x):
            net.zero_grad()
            if level == 'gradients':
                get_precision(net).set_samples(range(4))
            with torch.autocast(device.type, torch.bfloat16):
                out = net(x)
            out.backward(torch.ones_like(out))
            return net[0].weight.grad.isfinite()

        # The first pass makes a history.
        assert run(x).all()
        bad = x.clone()
        bad.view(-1)[17] = float(value)
        assert not run(bad).all()
        assert run(x).all()

    @pytest.mark.parametrize('level', ['L2', 'L3', dict(use_gradient=True)])
    def test_skipped_step(self, level, device):
        """The scale halves, the weights stay, and training goes on."""
        net = make_net(level, num_samples=4).to(device)
        optimizer = torch.optim.SGD(
            [p for p in net.parameters() if p.requires_grad], lr=0.01
        )
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        adaptive = level != 'L2'

        def step(index, factor=1.0):
            if isinstance(level, dict):
                get_precision(net).set_samples(range(4))
            optimizer.zero_grad()
            images = batch(index, device=device)
            loss = net(images).square().mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        for index in range(3):
            step(index)
        before = {k: v.clone() for k, v in net.named_parameters()}
        # In the fourth pass all layers report.
        step(3, float('inf'))
        assert scaler.get_scale() == 512
        for key, value in net.named_parameters():
            assert_same_bits(value, before[key])
        for index in range(4, 12):
            step(index)
        assert scaler.get_scale() == 512
        assert not torch.equal(net.stem.weight, before['stem.weight'])
        for parameter in net.parameters():
            assert parameter.isfinite().all()
        if not adaptive:
            return
        precision = get_precision(net)
        state = precision.state_dict()
        # Passes 1 and 2; 6 and 7, which make up for the fourth; and 8.
        assert {v[-1] for v in state['averages'].values()} == {5}
        for values in state['averages'].values():
            assert torch.tensor(values).isfinite().all()
        assert all(1 <= bits <= 8 for bits in state['bits'].values())
        assert len(set(state['bits'].values())) > 1
        if isinstance(level, dict):
            assert state['history'].isfinite().all()
            assert state['history'].ne(1).any(1).all()
            assert state['scales'].isfinite().all()

    def test_overflow_of_the_scale(self):
        if not torch.cuda.is_available():
            pytest.skip('no GPU is available, and float16 needs one')
        net = make_net().cuda()
        optimizer = torch.optim.SGD(
            [p for p in net.parameters() if p.requires_grad], lr=0.01
        )
        scaler = torch.amp.GradScaler('cuda', init_scale=2.0**60)
        before = net.stem.weight.detach().clone()
        with torch.autocast('cuda', torch.float16):
            loss = net(batch(0, device='cuda')).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**59
        assert_same_bits(net.stem.weight, before)
        net.zero_grad()
        train(net, range(6), 'cuda')
        assert get_precision(net)._averages
