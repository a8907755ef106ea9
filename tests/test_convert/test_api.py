"""Conversion by class swap, and the way back."""

import copy
import io

import pytest
import torch
from mmcv.cnn.bricks import wrappers
from mmengine.model.utils import (
    _BatchNormXd,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)
from mmengine.utils.dl_utils.parrots_wrapper import (
    SyncBatchNorm as MMEngineSyncBatchNorm,
)
from support.layers import assert_same_bits, exact_numerics
from torch import nn

import mmactnn
from mmactnn import (
    LEVELS,
    Level,
    QAdaptiveAvgPool2d,
    QAvgPool2d,
    QBatchNorm,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QGroupNorm,
    QLeakyReLU,
    QLinear,
    QMaxPool2d,
    QReLU,
    QReLU6,
    QSyncBatchNorm,
    QuantizedLayer,
    convert_model,
    get_level,
    revert_model,
    set_optimization_level,
)
from mmactnn.fusion import plain_class_of


class OwnConv(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, input):
        return super().forward(input.abs())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.own = OwnConv(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.own(self.body(self.stem(x)))
        return self.head(self.flat(self.pool(x)))


@pytest.fixture(autouse=True)
def _exact_numerics():
    with exact_numerics():
        yield


@pytest.fixture
def net(seed):
    return Net()


@pytest.fixture
def default_level():
    """Levels are set for the whole process: put the default back."""
    yield
    set_optimization_level('L3')


def compressed(model):
    return [
        n for n, m in model.named_modules() if isinstance(m, QuantizedLayer)
    ]


def left(report):
    return {item.name: item.reason for item in report.left}


BLOCKS = ['stem.0', 'stem.1', 'stem.2', 'body.0', 'body.1', 'body.2']
LAYERS = [*BLOCKS, 'head']


class TestSwap:
    def test_classes(self, net):
        report = convert_model(net)
        classes = [type(net.get_submodule(name)) for name in LAYERS]
        assert classes == 2 * [QConv2d, QBatchNorm2d, QReLU] + [QLinear]
        assert compressed(net) == LAYERS
        assert report.level == 'L3'
        assert [c.name for c in report.converted] == LAYERS
        assert [c.bits for c in report.converted] == [8, 2, 1, 2, 2, 1, 2]
        assert report.converted[0].source == 'Conv2d'
        assert report.converted[0].target == 'QConv2d'

    def test_parameters_and_buffers_stay_the_same_objects(self, net):
        before = {
            **dict(net.named_parameters()),
            **dict(net.named_buffers()),
        }
        modules = dict(net.named_modules())
        state = copy.deepcopy(net.state_dict())
        convert_model(net)
        after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert all(m is modules[n] for n, m in net.named_modules())
        assert list(net.state_dict()) == list(state)
        for key, value in net.state_dict().items():
            assert_same_bits(value, state[key])

    def test_optimizer_and_hooks_go_on(self, net, device):
        net.to(device)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        calls = []
        net.stem[0].register_forward_hook(lambda *_: calls.append('forward'))
        net.stem[0].register_full_backward_hook(
            lambda *_: calls.append('backward')
        )
        net.stem[0].weight.register_hook(lambda *_: calls.append('gradient'))
        convert_model(net)
        before = copy.deepcopy(net.state_dict())
        x = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
        net(x).sum().backward()
        assert sorted(calls) == ['backward', 'forward', 'gradient']
        optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(p, before[name] - 0.1 * p.grad)
        assert not torch.equal(net.stem[0].weight, before['stem.0.weight'])

    def test_attributes_stay(self, net):
        convert_model(net)
        assert net.body[0].groups == 2
        assert net.body[2].inplace and not net.stem[2].inplace
        net.eval()
        assert not net.body[0].training

    def test_the_model_itself(self):
        conv = nn.Conv2d(3, 4, 3)
        report = convert_model(conv)
        assert type(conv) is QConv2d
        assert [c.name for c in report.converted] == ['']

    def test_a_layer_in_two_places(self):
        relu = nn.ReLU()
        model = nn.Sequential(relu, nn.Conv2d(3, 4, 3), relu)
        report = convert_model(model)
        assert [c.name for c in report.converted] == ['0', '1']
        assert model[0] is model[2]

    def test_a_model_that_is_converted_in_part(self):
        model = nn.Sequential(QConv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        report = convert_model(model, 'L2')
        assert [c.source for c in report.converted] == ['QConv2d', 'Conv2d']
        assert [m.quantizer.bits for m in model] == [4, 4]

    @pytest.mark.parametrize('value', [None, 3, torch.ones(2), nn.Conv2d])
    def test_no_module(self, value):
        with pytest.raises(TypeError, match=type(value).__name__):
            convert_model(value)

    @pytest.mark.parametrize('group_size', [0, 100, 1024])
    def test_unknown_group_size(self, group_size, net):
        with pytest.raises(ValueError, match=f'group_size.*{group_size}'):
            convert_model(net, group_size=group_size)

    @pytest.mark.parametrize('group_size', [64, 512])
    def test_group_size(self, group_size, net):
        convert_model(net, group_size=group_size)
        assert net.stem[0].quantizer.group_size == group_size


class TestTypes:
    @pytest.mark.parametrize(
        ('make', 'target', 'size'),
        [
            (lambda: nn.Conv1d(4, 4, 3), QConv1d, (6,)),
            (lambda: nn.Conv2d(4, 4, 3), QConv2d, (6, 6)),
            (lambda: nn.Conv3d(4, 4, 3), QConv3d, (6, 6, 6)),
            (lambda: nn.ConvTranspose1d(4, 4, 3), QConvTranspose1d, (6,)),
            (lambda: nn.ConvTranspose2d(4, 4, 3), QConvTranspose2d, (6, 6)),
            (lambda: nn.ConvTranspose3d(4, 4, 3), QConvTranspose3d, 3 * (6,)),
            (lambda: nn.Linear(4, 4), QLinear, ()),
            (lambda: wrappers.Conv2d(4, 4, 3), QConv2d, (6, 6)),
            (lambda: wrappers.Conv3d(4, 4, 3), QConv3d, (6, 6, 6)),
            (
                lambda: wrappers.ConvTranspose2d(4, 4, 3),
                QConvTranspose2d,
                (6, 6),
            ),
            (
                lambda: wrappers.ConvTranspose3d(4, 4, 3),
                QConvTranspose3d,
                (6, 6, 6),
            ),
            (lambda: wrappers.Linear(4, 4), QLinear, ()),
            (lambda: nn.BatchNorm1d(4), QBatchNorm1d, (6,)),
            (lambda: nn.BatchNorm2d(4), QBatchNorm2d, (6, 6)),
            (lambda: nn.BatchNorm3d(4), QBatchNorm3d, (6, 6, 6)),
            (lambda: nn.GroupNorm(2, 4), QGroupNorm, (6, 6)),
            (lambda: nn.SyncBatchNorm(4), QSyncBatchNorm, (6, 6)),
            (lambda: MMEngineSyncBatchNorm(4), QSyncBatchNorm, (6, 6)),
            (lambda: _BatchNormXd(4), QBatchNorm, (6, 6)),
            (lambda: nn.ReLU(), QReLU, (6, 6)),
            (lambda: nn.ReLU6(), QReLU6, (6, 6)),
            (lambda: nn.LeakyReLU(), QLeakyReLU, (6, 6)),
            (lambda: nn.MaxPool2d(2), QMaxPool2d, (6, 6)),
            (lambda: wrappers.MaxPool2d(2), QMaxPool2d, (6, 6)),
            (lambda: nn.AvgPool2d(2), QAvgPool2d, (6, 6)),
            (lambda: nn.AdaptiveAvgPool2d(2), QAdaptiveAvgPool2d, (6, 6)),
        ],
    )
    def test_mapped(self, make, target, size, device):
        model = nn.Sequential(make()).to(device)
        source = type(model[0])
        attributes = set(vars(model[0]))
        x = torch.randn(2, 4, *size, device=device)
        expected = copy.deepcopy(model)(x.requires_grad_())
        report = convert_model(model)
        assert type(model[0]) is target
        assert report.converted[0].source == source.__name__
        assert_same_bits(model(x), expected)
        revert_model(model)
        assert type(model[0]) is source
        assert set(vars(model[0])) == attributes

    @pytest.mark.parametrize('make', [wrappers.Linear, wrappers.Conv2d])
    def test_no_samples(self, make, device):
        # As MMCV's wrappers support it: heads of images without objects.
        model = make(4, 3, *(1,) * (make is wrappers.Conv2d)).to(device)
        convert_model(model)
        size = (0, 4, 5, 5) if make is wrappers.Conv2d else (0, 4)
        x = torch.zeros(size, device=device, requires_grad=True)
        model(x).sum().backward()
        assert x.grad.shape == size
        assert not any(p.grad.any() for p in model.parameters())

    def test_what_mmengine_takes_off(self):
        # Its runner does so before any hook; neither keeps our class.
        model = nn.Sequential(QBatchNorm2d(4), QSyncBatchNorm(4))
        model = revert_sync_batchnorm(model)
        convert_model(model)
        assert [type(m) for m in model] == [QBatchNorm2d, QBatchNorm]
        model = convert_sync_batchnorm(model, 'torch')
        assert compressed(model) == []
        convert_model(model)
        assert [type(m) for m in model] == 2 * [QSyncBatchNorm]

    def test_norm_without_affine_or_statistics(self, device):
        model = nn.Sequential(
            nn.BatchNorm2d(4, affine=False),
            nn.BatchNorm2d(4, track_running_stats=False),
        ).to(device)
        x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
        expected = model(x)
        convert_model(model)
        assert_same_bits(model(x), expected)

    def test_subclass_is_left_with_the_reason(self, net):
        report = convert_model(net)
        assert plain_class_of(net.own) is OwnConv
        assert left(report)['own'] == (
            'subclass of Conv2d, computes otherwise'
        )

    def test_other_layers_are_left_with_the_reason(self, net):
        reasons = left(convert_model(net))
        assert reasons.keys() == {'own', 'pool', 'flat'}
        assert reasons['pool'] == 'keeps nothing'
        assert reasons['flat'] == 'keeps nothing'

    def test_layers_that_would_keep_as_much(self):
        model = nn.Sequential(
            nn.MaxPool2d(17),
            wrappers.MaxPool2d((2, 150)),
            nn.MaxPool2d(2, return_indices=True),
            QMaxPool2d(17),
            nn.AdaptiveAvgPool2d((1, 1)),
        )
        classes = [type(m) for m in model]
        report = convert_model(model)
        assert [type(m) for m in model] == classes
        assert not report.converted
        assert [item.reason for item in report.left] == [
            'window of 289 taps, 256 at most',
            'window of 300 taps, 256 at most',
            'returns the indices, which take more than 4 bits',
            'window of 289 taps, 256 at most',
            'keeps nothing',
        ]
        assert 'MaxPool2d left: window of 289 taps' in str(report)

    def test_bits_of_exact_layers(self):
        model = nn.Sequential(
            nn.LeakyReLU(),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.Dropout(),
            nn.Dropout2d(),
        )
        for level, bits in [('L1', [1, 4, 0, 0, 0]), ('L0', 5 * [None])]:
            report = convert_model(model, level)
            assert [c.bits for c in report.converted] == bits
        assert 'AvgPool2d (0 bit)' in str(convert_model(model))


class TestFilters:
    @pytest.mark.parametrize(
        ('include', 'exclude', 'expected'),
        [
            (['stem.*'], (), LAYERS[:3]),
            (['*.0'], (), ['stem.0', 'body.0']),
            (['stem.?', 'body.2'], (), LAYERS[:3] + ['body.2']),
            (['Conv2d'], (), ['stem.0', 'body.0']),
            ([nn.ReLU], (), ['stem.2', 'body.2']),
            (None, [nn.Conv2d], [*LAYERS[1:3], *LAYERS[4:]]),
            (None, ['stem.*', 'ReLU'], ['body.0', 'body.1', 'head']),
            (['body.*'], ['BatchNorm2d'], ['body.0', 'body.2']),
            # Given alone, not in a list.
            ('stem.0', (), ['stem.0']),
            ('head', (), ['head']),
            (None, nn.ReLU, [n for n in LAYERS if not n.endswith('2')]),
            (['*'], ['*'], []),
            ([], (), []),
        ],
    )
    def test_select(self, include, exclude, expected, net):
        report = convert_model(net, include=include, exclude=exclude)
        assert compressed(net) == expected
        assert [c.name for c in report.converted] == expected

    def test_reasons(self, net):
        reasons = left(
            convert_model(net, include=['stem.*'], exclude=[nn.ReLU])
        )
        assert reasons['body.0'] == 'not included'
        assert reasons['stem.2'] == 'excluded'

    @pytest.mark.parametrize('argument', ['include', 'exclude'])
    @pytest.mark.parametrize(
        'pattern',
        [
            'bakbone.*',
            'Stem.*',
            'SyncBatchNorm',
            nn.SyncBatchNorm,
            'own',
            'pool',
        ],
    )
    def test_pattern_that_matches_nothing(self, pattern, argument, net):
        filters = {argument: ['stem.0', pattern]}
        # repr of a class holds no characters that mean something to re.
        shown = repr(pattern).replace('*', r'\*')
        with pytest.raises(ValueError, match=f'{argument}.*{shown}'):
            convert_model(net, **filters)

    def test_pattern_that_matches_nothing_changes_nothing(self, net):
        with pytest.raises(ValueError, match='bakbone'):
            convert_model(net, include=['stem.*', 'bakbone.*'])
        assert compressed(net) == []

    @pytest.mark.parametrize('pattern', [3, None, nn.ReLU()])
    def test_pattern_of_another_kind(self, pattern, net):
        with pytest.raises(TypeError, match='include'):
            convert_model(net, include=[pattern])

    def test_original_class_still_selects(self, net):
        convert_model(net, 'L3')
        convert_model(net, 'L2', include=[nn.Conv2d])
        bits = [net.get_submodule(n).quantizer.bits for n in BLOCKS]
        assert bits == 2 * [4, 2, 1]
        convert_model(net, 'L0', include=['QBatchNorm2d', 'ReLU'])
        bits = [net.get_submodule(n).quantizer.bits for n in BLOCKS]
        assert bits == 2 * [4, None, None]


class TestLevels:
    @pytest.mark.parametrize(
        ('level', 'bits'),
        [
            ('L0', [None, None, None]),
            ('L1', [4, None, 1]),
            ('L2', [4, 4, 1]),
            ('L3', [8, 2, 1]),
            (Level('mine', conv=8, norm=1, mask=False), [8, 1, None]),
        ],
    )
    def test_bits(self, level, bits, net):
        report = convert_model(net, level)
        assert [m.quantizer.bits for m in net.stem] == bits
        assert report.level == getattr(level, 'name', level)

    def test_change_on_a_converted_model(self, net, device):
        net.to(device)
        x = torch.randn(2, 3, 8, 8, device=device)

        def weight_gradient():
            net.zero_grad()
            net(x).square().sum().backward()
            return net.body[0].weight.grad.clone()

        exact = weight_gradient()
        convert_model(net, 'L3')
        assert (weight_gradient() != exact).any()
        convert_model(net, 'L0')
        assert_same_bits(weight_gradient(), exact)

    def test_own_bits_are_kept(self):
        model = nn.Sequential(
            QConv2d(3, 4, 3, bits=8), QConv2d(4, 4, 3), QBatchNorm2d(4, bits=1)
        )
        for level, bits in [
            ('L2', [8, 4, 1]),
            ('L1', [8, 4, 1]),
            ('L0', [None, None, None]),  # exact is exact
            ('L3', [8, 2, 1]),
        ]:
            report = convert_model(model, level)
            assert [m.quantizer.bits for m in model] == bits
            assert [c.bits for c in report.converted] == bits

    def test_own_group_size_is_kept(self):
        model = nn.Sequential(
            QConv2d(3, 4, 3, group_size=64), QConv2d(4, 4, 3)
        )
        assert [m.quantizer.group_size for m in model] == [64, 256]
        convert_model(model, 'L3', group_size=128)
        assert [m.quantizer.group_size for m in model] == [64, 128]

    def test_models_do_not_share_a_level(self, net):
        other = copy.deepcopy(net)
        convert_model(net, 'L2')
        convert_model(other, 'L3')
        twin = copy.deepcopy(net)
        convert_model(twin, 'L0')
        assert net.stem[0].quantizer.bits == 4
        assert other.stem[1].quantizer.bits == 2
        assert twin.stem[0].quantizer.exact

    @pytest.mark.parametrize('level', ['L9', 'l3', ''])
    def test_unknown(self, level, net):
        with pytest.raises(ValueError, match=f'L0.*L3.*{level!r}'):
            convert_model(net, level)
        assert compressed(net) == []

    @pytest.mark.parametrize('level', [3, None, 2.0])
    def test_neither_name_nor_level(self, level, net):
        with pytest.raises(TypeError, match=type(level).__name__):
            convert_model(net, level)

    @pytest.mark.parametrize('kind', ['conv', 'norm'])
    def test_codes_of_no_bits(self, kind):
        with pytest.raises(ValueError, match='bits.*got 0'):
            Level('odd', **{'conv': 2, 'norm': 2, kind: 0}, mask=True)
        with pytest.raises(ValueError, match='bits.*got 0'):
            QConv2d(3, 4, 3, bits=0)

    def test_bits_that_do_not_exist(self):
        with pytest.raises(ValueError, match='bits.*got 9'):
            Level('odd', conv=2, norm=9, mask=True)

    def test_names(self):
        for name, level in LEVELS.items():
            assert level.name == name
            assert get_level(name) is level
            assert level.exact == (name in ('L0', 'swap'))


class TestExactLevel:
    def test_training_is_bit_identical(self, net, device):
        net.to(device)
        twin = copy.deepcopy(net)
        convert_model(net, 'L0')
        xs = [torch.randn(4, 3, 8, 8, device=device) for _ in range(4)]

        def train(model):
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            losses = []
            for x in xs:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return torch.stack(losses)

        assert_same_bits(train(net), train(twin))
        for key, value in net.state_dict().items():
            assert_same_bits(value, twin.state_dict()[key])


class TestRevert:
    def test_exact_classes(self, net):
        net.stem.append(wrappers.Conv2d(8, 8, 1))
        net.body.append(_BatchNormXd(8))
        classes = {n: type(m) for n, m in net.named_modules()}
        attributes = {n: set(vars(m)) for n, m in net.named_modules()}
        convert_model(net)
        names = revert_model(net)
        assert sorted(names) == sorted([*LAYERS, 'stem.3', 'body.3'])
        assert {n: type(m) for n, m in net.named_modules()} == classes
        # Nothing is left behind on the modules.
        assert {n: set(vars(m)) for n, m in net.named_modules()} == attributes

    def test_built_as_compressed(self):
        model = nn.Sequential(
            QConv2d(3, 4, 3), QBatchNorm2d(4), QReLU(), QSyncBatchNorm(4)
        )
        assert revert_model(model) == ['0', '1', '2', '3']
        assert [type(m) for m in model] == [
            nn.Conv2d,
            nn.BatchNorm2d,
            nn.ReLU,
            nn.SyncBatchNorm,
        ]

    def test_after_changes_of_the_level(self):
        model = nn.Sequential(wrappers.Conv2d(3, 4, 3))
        for level in ('L3', 'L0', 'L2'):
            convert_model(model, level)
        revert_model(model)
        assert type(model[0]) is wrappers.Conv2d

    def test_plain_model(self, net):
        assert revert_model(net) == []

    def test_again(self, net):
        convert_model(net)
        revert_model(net)
        assert [c.name for c in convert_model(net).converted] == LAYERS


class TestCheckpoints:
    @pytest.mark.parametrize('from_converted', [True, False])
    def test_exchange(self, from_converted, net, device):
        other = Net().to(device)
        net.to(device)
        convert_model(net if from_converted else other)
        x = torch.randn(4, 3, 8, 8, device=device)
        net(x)  # statistics that no model starts with
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        result = other.load_state_dict(torch.load(file), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        net.eval(), other.eval()
        assert_same_bits(other(x), net(x))

    def test_whole_model(self, net, device):
        net.to(device)
        convert_model(net, 'L2')
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert compressed(twin) == LAYERS
        assert twin.stem[0].quantizer.bits == 4
        x = torch.randn(4, 3, 8, 8, device=device)
        assert_same_bits(twin(x), net(x))
        revert_model(twin)
        assert compressed(twin) == []
        assert type(twin.stem[0]) is nn.Conv2d


class TestReport:
    def test_text(self, net):
        text = str(convert_model(net, 'L2', exclude=['stem.*'])).splitlines()
        assert text[0] == ('ActNN level L2: 4 layers compressed, 6 left')
        assert '     1 Conv2d -> QConv2d (4 bit)' in text
        assert '     1 BatchNorm2d -> QBatchNorm2d (4 bit)' in text
        assert '     1 ReLU -> QReLU (1 bit)' in text
        assert any('1 Conv2d left: excluded (stem.0)' in t for t in text)
        assert any('1 OwnConv left: subclass of Conv2d' in t for t in text)
        assert any('left: keeps nothing' in t for t in text)

    def test_many_names(self):
        model = nn.Sequential(*[nn.Bilinear(2, 2, 2) for _ in range(5)])
        text = str(convert_model(model))
        assert '5 Bilinear left' in text and '(0, 1, 2, ...)' in text

    def test_exact(self, net):
        assert '2 Conv2d -> QConv2d (exact)' in str(convert_model(net, 'L0'))

    def test_layers_of_one_type_with_different_bits(self):
        model = nn.Sequential(
            QConv2d(3, 4, 3, bits=8), QConv2d(4, 4, 3), QConv2d(4, 4, 3)
        )
        text = str(convert_model(model, 'L3'))
        assert '1 QConv2d -> QConv2d (8 bit)' in text
        assert '2 QConv2d -> QConv2d (2 bit on average)' in text
        assert '3 QConv2d -> QConv2d (exact)' in str(
            convert_model(model, 'L0')
        )


class TestOriginalInterface:
    """As users of the original package know it."""

    def test_default(self, net):
        assert mmactnn.QModule(net) is net
        assert net.stem[1].quantizer.bits == 2

    def test_level(self, net, default_level):
        other = copy.deepcopy(net)
        set_optimization_level('L2')
        mmactnn.QModule(net)
        set_optimization_level('L0')
        mmactnn.QModule(other)
        assert net.stem[0].quantizer.bits == 4
        assert other.stem[0].quantizer.exact
        # No other way of converting is affected.
        third = nn.Sequential(nn.Conv2d(3, 4, 3))
        convert_model(third)
        assert third[0].quantizer.bits == 2

    def test_unknown_level(self, net, default_level):
        with pytest.raises(ValueError, match="'L7'"):
            set_optimization_level('L7')
        with pytest.raises(TypeError, match='int'):
            set_optimization_level(3)
        assert mmactnn.QModule(net).stem[1].quantizer.bits == 2
