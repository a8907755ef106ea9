"""Names in configs, and what MMEngine and MMCV do with our layers."""

import importlib.metadata

import pytest
import torch
from mmcv.cnn import (
    ConvModule,
    build_activation_layer,
    build_conv_layer,
    build_norm_layer,
    build_upsample_layer,
)
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.norm import infer_abbr
from mmengine.config import Config
from mmengine.config import config as config_module
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.model import BaseModule
from mmengine.registry import HOOKS, MODELS, DefaultScope
from support.pairs import in_turn, parametrize_pairs
from support.tools import ROOT

from mmactnn import (
    QELU,
    QGELU,
    QAdaptiveAvgPool2d,
    QAvgPool2d,
    QBatchNorm1d,
    QBatchNorm2d,
    QBatchNorm3d,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QDropout,
    QDropout2d,
    QGroupNorm,
    QHardsigmoid,
    QHardswish,
    QLayerNorm,
    QLeakyReLU,
    QLinear,
    QMaxPool2d,
    QMish,
    QReLU,
    QReLU6,
    QRMSNorm,
    QSigmoid,
    QSiLU,
    QSoftplus,
    QSyncBatchNorm,
    QTanh,
)
from mmactnn.hooks import ActNNHook
from mmactnn.mmlab import registry

SCOPES = [None, 'mmengine', 'mmdet', 'mmseg']
PREFIXES = dict(plain='', dotted='mmactnn.')
NAMES = {
    'QLayerNorm': QLayerNorm,
    'QLN': QLayerNorm,
    'QRMSNorm': QRMSNorm,
    'QRMSN': QRMSNorm,
    'QConv1d': QConv1d,
    'QConv2d': QConv2d,
    'QConv': QConv2d,
    'QConv3d': QConv3d,
    'QConvTranspose1d': QConvTranspose1d,
    'QConvTranspose2d': QConvTranspose2d,
    'QConvTranspose3d': QConvTranspose3d,
    'QLinear': QLinear,
    'QBN1d': QBatchNorm1d,
    'QBatchNorm1d': QBatchNorm1d,
    'QBN2d': QBatchNorm2d,
    'QBN': QBatchNorm2d,
    'QBatchNorm2d': QBatchNorm2d,
    'QBN3d': QBatchNorm3d,
    'QBatchNorm3d': QBatchNorm3d,
    'QGN': QGroupNorm,
    'QGroupNorm': QGroupNorm,
    'QSyncBN': QSyncBatchNorm,
    'QSyncBatchNorm': QSyncBatchNorm,
    'QReLU': QReLU,
    'QReLU6': QReLU6,
    'QGELU': QGELU,
    'QSiLU': QSiLU,
    'QMish': QMish,
    'QSoftplus': QSoftplus,
    'QHardswish': QHardswish,
    'QHSwish': QHardswish,
    'QELU': QELU,
    'QSigmoid': QSigmoid,
    'QTanh': QTanh,
    'QHardsigmoid': QHardsigmoid,
    'QLeakyReLU': QLeakyReLU,
    'QMaxPool2d': QMaxPool2d,
    'QAvgPool2d': QAvgPool2d,
    'QAdaptiveAvgPool2d': QAdaptiveAvgPool2d,
    'QDropout': QDropout,
    'QDropout2d': QDropout2d,
}


def set_scope(scope):
    """A default scope, as a runner sets it."""
    if scope is not None:
        DefaultScope.get_instance('test', scope_name=scope)


# Every scope, and every prefix, with each way to build a layer.
@pytest.fixture(
    params=[
        (None, ''),
        ('mmengine', 'mmactnn.'),
        ('mmdet', 'mmactnn.'),
        ('mmseg', ''),
    ],
    ids=['no scope', 'mmengine-dotted', 'mmdet-dotted', 'mmseg'],
)
def scope_and_prefix(request):
    set_scope(request.param[0])
    return request.param


@pytest.fixture
def prefix(scope_and_prefix):
    return scope_and_prefix[1]


@pytest.fixture
def scope(scope_and_prefix):
    return scope_and_prefix[0]


class TestNames:
    @parametrize_pairs(scope=SCOPES, prefix=PREFIXES)
    def test_layers(self, prefix, scope):
        set_scope(scope)
        with MODELS.switch_scope_and_registry(None) as models:
            for name, cls in NAMES.items():
                assert models.get(prefix + name) is cls, name

    def test_hook(self, prefix, scope):
        hook = HOOKS.build(dict(type=prefix + 'ActNNHook', level='L2'))
        assert type(hook) is ActNNHook and hook.level.name == 'L2'

    def test_no_other_names_are_registered(self):
        others = {
            'QBatchNorm',
            'QCrossEntropyLoss',
            'QFPN',
            'QGate',
            'QHSigmoid',
            'QLosses',
            'QMatrixProduct',
            'QMultiheadAttention',
            'QPReLU',
            'QProduct',
            'QRPNHead',
            'QResizedCrossEntropy',
            'QRetinaHead',
            'QScaledDotProductAttention',
            'QSwish',
        }
        # Known once a model has a class of the toolboxes.
        later = {
            'QChannelAttention',
            'QConv2dAdaptivePadding',
            'QConvAWS2d',
            'QConvWS2d',
            'QDecodeHead',
            'QDeformConv2d',
            'QDeformConv2dPack',
            'QDeformableSampling',
            'QDenseHead',
            'QModulatedDeformConv2d',
            'QModulatedDeformConv2dPack',
            'QNormedConv2d',
            'QSELayer',
            'QSegFPN',
        }
        found = set(registry.MODELS.module_dict)
        assert found - later == {*NAMES, *others}
        assert set(registry.HOOKS.module_dict) == {'ActNNHook'}

    def test_conv(self, prefix, scope):
        cfg = dict(type=prefix + 'QConv2d', bits=4)
        conv = build_conv_layer(cfg, 3, 8, 3, stride=2, bias=False)
        assert type(conv) is QConv2d
        assert conv.quantizer.bits == 4 and conv.stride == (2, 2)
        assert conv.bias is None
        assert cfg == dict(type=prefix + 'QConv2d', bits=4)

    @in_turn(name=['QBN', 'QBN1d', 'QBN2d', 'QBN3d', 'QSyncBN'])
    def test_norm(self, name, prefix, scope):
        cfg = dict(type=prefix + name, requires_grad=False, eps=1e-3)
        # The attribute's name decides about the keys of checkpoints.
        attribute, norm = build_norm_layer(cfg, 8, postfix=1)
        assert attribute == 'bn1'
        assert type(norm) is NAMES[name]
        assert norm.eps == 1e-3
        assert not norm.weight.requires_grad

    @in_turn(name=['QGN', 'QGroupNorm'])
    def test_group_norm(self, name, prefix, scope):
        # MMCV knows the order of nn.GroupNorm's arguments, and no other's.
        cfg = dict(type=prefix + name, num_groups=2, bits=4, eps=1e-3)
        attribute, norm = build_norm_layer(cfg, 8, postfix=1)
        assert attribute == 'gn1'
        assert type(norm) is QGroupNorm and norm.quantizer.bits == 4
        assert (norm.num_groups, norm.num_channels) == (2, 8)
        assert norm.eps == 1e-3

    def test_linear(self, prefix, scope):
        # As the box heads of MMDetection build their predictors.
        cfg = dict(type=prefix + 'QLinear', bits=4)
        cfg.update(in_features=8, out_features=3)
        linear = MODELS.build(cfg)
        assert type(linear) is QLinear
        assert (linear.in_features, linear.quantizer.bits) == (8, 4)

    def test_upsample(self, prefix, scope):
        cfg = dict(
            type=prefix + 'QConvTranspose2d',
            in_channels=8,
            out_channels=4,
            kernel_size=2,
            stride=2,
        )
        assert type(build_upsample_layer(cfg)) is QConvTranspose2d

    @in_turn(name=['QReLU', 'QReLU6', 'QLeakyReLU'])
    def test_activation(self, name, prefix, scope):
        cfg = dict(type=prefix + name, inplace=True)
        relu = build_activation_layer(cfg)
        assert type(relu) is NAMES[name] and relu.inplace

    def test_leaky_relu_of_a_slope(self, prefix, scope):
        module = ConvModule(
            3,
            8,
            3,
            act_cfg=dict(type=prefix + 'QLeakyReLU', negative_slope=0.1),
        )
        assert type(module.activate) is QLeakyReLU
        assert module.activate.negative_slope == 0.1

    def test_dropout(self, prefix, scope):
        cfg = dict(type=prefix + 'QDropout', p=0.1)
        dropout = build_dropout(cfg)
        assert type(dropout) is QDropout and dropout.p == 0.1

    def test_pooling(self, prefix, scope):
        cfg = dict(type=prefix + 'QMaxPool2d', kernel_size=3, stride=2)
        pool = MODELS.build(cfg)
        assert type(pool) is QMaxPool2d and pool.stride == 2

    def test_conv_module(self, prefix, scope):
        module = ConvModule(
            3,
            8,
            3,
            conv_cfg=dict(type=prefix + 'QConv2d'),
            norm_cfg=dict(type=prefix + 'QBN2d', requires_grad=True),
            act_cfg=dict(type=prefix + 'QReLU'),
        )
        assert type(module.conv) is QConv2d and module.conv.bias is None
        assert type(module.bn) is QBatchNorm2d
        assert type(module.activate) is QReLU and module.activate.inplace
        plain = ConvModule(3, 8, 3, norm_cfg=dict(type='BN'))
        assert list(module.state_dict()) == list(plain.state_dict())
        module(torch.randn(2, 3, 8, 8)).sum().backward()
        assert module.conv.weight.grad.isfinite().all()

    def test_abbreviation(self):
        for cls in set(NAMES.values()):
            if 'BatchNorm' in cls.__name__:
                assert infer_abbr(cls) == 'bn'
        assert infer_abbr(QGroupNorm) == 'gn'

    def test_wrong_value_from_a_config(self, scope):
        cfg = dict(type='QConv2d', bits=9)
        with pytest.raises(ValueError, match='got 9'):
            build_conv_layer(cfg, 3, 8, 3)


class TestInitConfig:
    """``init_cfg`` compares names of classes and of their direct bases."""

    class Block(BaseModule):
        def __init__(self, norm, init_cfg):
            super().__init__(init_cfg)
            self.conv = QConv2d(3, 8, 3)
            self.bn = norm(8)

    @pytest.mark.parametrize(
        'norm', [QBatchNorm1d, QBatchNorm2d, QBatchNorm3d, QSyncBatchNorm]
    )
    def test_layer(self, norm):
        # As in the backbones of MMDetection and MMSegmentation.
        block = self.Block(
            norm,
            [
                dict(type='Constant', layer='Conv2d', val=0.5, bias=0.25),
                dict(type='Constant', layer='_BatchNorm', val=3.0, bias=2.0),
            ],
        )
        block.init_weights()
        assert (block.conv.weight == 0.5).all()
        assert (block.conv.bias == 0.25).all()
        assert (block.bn.weight == 3.0).all()
        assert (block.bn.bias == 2.0).all()

    @pytest.mark.parametrize(
        ('make', 'layer'),
        [
            (lambda: QConv1d(3, 8, 3), 'Conv1d'),
            (lambda: QConv3d(3, 8, 3), 'Conv3d'),
            (lambda: QConvTranspose1d(3, 8, 3), 'ConvTranspose1d'),
            (lambda: QConvTranspose2d(3, 8, 3), 'ConvTranspose2d'),
            (lambda: QConvTranspose3d(3, 8, 3), 'ConvTranspose3d'),
            (lambda: QLinear(3, 8), 'Linear'),
            (lambda: QGroupNorm(2, 8), 'GroupNorm'),
        ],
    )
    def test_other_layers(self, make, layer):
        block = BaseModule(dict(type='Constant', layer=layer, val=0.5))
        block.layer = make()
        block.init_weights()
        assert (block.layer.weight == 0.5).all()

    def test_same_draws_as_for_plain_layers(self):
        def draw(conv_type, norm_type):
            torch.manual_seed(0)
            module = ConvModule(
                3,
                8,
                3,
                conv_cfg=dict(type=conv_type),
                norm_cfg=dict(type=norm_type),
            )
            module.init_weights()
            return module.state_dict()

        found, expected = draw('QConv2d', 'QBN2d'), draw('Conv2d', 'BN')
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert torch.equal(value, expected[key])


class TestExternalConfigs:
    """``_base_ = 'package::...'`` needs the package's name in a table."""

    def load(self, tmp_path, base):
        path = tmp_path / 'config.py'
        path.write_text(f'_base_ = {base!r}\n')
        return Config.fromfile(path)

    def test_mmseg(self, tmp_path):
        cfg = self.load(
            tmp_path, 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
        )
        assert cfg.model.decode_head.type == 'FCNHead'

    def test_mmdet(self, tmp_path):
        cfg = self.load(
            tmp_path, 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
        )
        assert cfg.model.backbone.depth == 18

    def test_mmpretrain(self, tmp_path):
        cfg = self.load(tmp_path, 'mmpretrain::resnet/resnet18_8xb32_in1k.py')
        assert cfg.model.backbone.depth == 18

    def test_mmactnn(self, tmp_path, monkeypatch):
        # As installed: the configs lie in .mim inside of the package.
        package = tmp_path / 'mmactnn'
        (package / '.mim').mkdir(parents=True)
        for name in ('configs', 'model-index.yml'):
            (package / '.mim' / name).symlink_to(ROOT / name)
        installed = config_module.get_installed_path
        monkeypatch.setattr(
            config_module,
            'get_installed_path',
            lambda name: (
                str(package) if name == 'mmactnn' else installed(name)
            ),
        )
        monkeypatch.setattr(config_module, 'is_installed', lambda name: True)
        cfg = self.load(tmp_path, 'mmactnn::_base_/actnn.py')
        assert cfg.actnn.conv_cfg.type == 'QConv2d'
        assert cfg.custom_hooks[0].type == 'ActNNHook'

    @pytest.mark.parametrize(
        ('distributions', 'expected'),
        [
            ({'mmsegmentation'}, 'mmsegmentation'),
            ({'onedl-mmsegmentation'}, 'mmseg'),
        ],
    )
    def test_distributions(self, distributions, expected, monkeypatch):
        def distribution(name):
            if name not in distributions:
                raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, 'distribution', distribution)
        monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
        monkeypatch.delitem(MODULE2PACKAGE, 'mmactnn')
        registry._name_packages()
        assert MODULE2PACKAGE['mmseg'] == expected
        assert MODULE2PACKAGE['mmactnn'] == 'mmactnn'


# Code for processes where nothing of OpenMMLab is imported yet.
DOTTED = """
from mmengine.registry import HOOKS, MODELS
import sys
assert 'mmactnn' not in sys.modules
print(MODELS.get('mmactnn.QBN').__name__)
print(HOOKS.get('mmactnn.ActNNHook').__name__)
"""
ALONE = """
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg'):
    sys.modules[name] = None
import mmactnn, torch
conv = mmactnn.QModule(torch.nn.Conv2d(3, 4, 3))
conv(torch.ones(1, 3, 5, 5)).sum().backward()
print(type(conv).__name__, conv.weight.grad.mean().item())
"""
# MMEngine's optimizers import transformers if it is there, which imports
# other packages, for which a module of the same name that imports mmactnn
# may be taken. MMEngine is half imported then.
MIDDLE = """
import sys
sys.path.insert(0, {folder!r})
import {first}
import mmactnn
from mmengine.registry import HOOKS, MODELS
print(MODELS.get('QConv2d').__name__)
print(HOOKS.get('mmactnn.ActNNHook').__name__)
print(type(HOOKS.build(dict(type='ActNNHook'))).__name__)
"""
NEEDED = """
import mmactnn
print('imported')
"""
ORDERS = (
    'import mmactnn, mmengine',
    'import mmengine, mmactnn',
    'import mmactnn, importlib\nimportlib.reload(mmactnn)\nimport mmengine',
    "import mmengine\nmmengine.utils.import_modules_from_strings(['mmactnn'])",
)
ORDER = """
import sys
{imports}
from mmengine.registry import HOOKS, MODELS
print(MODELS.get('QBN').__name__)
print(type(HOOKS.build(dict(type='ActNNHook'))).__name__)
print([f for f in sys.meta_path if '_Waiting' in repr(f)])
import inspect, mmengine
print('Registry' in inspect.getsource(mmengine.registry))
print(*vars(mmengine.registry.__loader__))
"""
NOTHING = """
import sys, mmactnn
names = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
print([m for m in sys.modules if m.split('.')[0] in names])
"""
FIRSTS = ('mmengine.model', 'mmengine.optim', 'mmcv.cnn')


@pytest.fixture(scope='module')
def printed(tmp_path_factory, run_in_fork):
    """Output of pieces of code, by their name."""
    folder = tmp_path_factory.mktemp('packages')
    (folder / 'transformers').mkdir()
    (folder / 'transformers' / '__init__.py').write_text(
        'import needed_by_transformers\n'
    )
    (folder / 'needed_by_transformers.py').write_text(NEEDED)
    codes = dict(dotted=DOTTED, alone=ALONE, nothing=NOTHING)
    for imports in ORDERS:
        codes[imports] = ORDER.format(imports=imports)
    for first in FIRSTS:
        codes[first] = MIDDLE.format(folder=str(folder), first=first)
    found = {}
    for name, code in codes.items():
        done = run_in_fork(code, ROOT)
        found[name] = done.stdout.split() if not done.returncode else done
    return found


def test_dotted_names_need_no_import(printed):
    expected = ['QBatchNorm2d', 'ActNNHook']
    assert printed['dotted'] == expected


def test_without_mmengine_and_mmcv(printed):
    assert printed['alone'] == ['QConv2d', '9.0']


@pytest.mark.parametrize('first', FIRSTS)
def test_import_in_the_middle_of_mmengines(first, printed):
    expected = ['imported', 'QConv2d', 'ActNNHook', 'ActNNHook']
    assert printed[first] == expected


@pytest.mark.parametrize('imports', ORDERS)
def test_registered_in_any_order(imports, printed):
    """Names are known when both are imported; finders are those before."""
    expected = ['QBatchNorm2d', 'ActNNHook', '[]', 'True', 'name', 'path']
    assert printed[imports] == expected


def test_importing_us_imports_none_of_openmmlab(printed):
    assert printed['nothing'] == ['[]']
