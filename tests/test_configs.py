"""The configs that are shipped."""

from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from support.stock import OFFICIAL, official, plain
from support.torchvision_stub import make_torchvision_importable
from torch.nn.modules.batchnorm import _BatchNorm

import mmactnn

CONFIGS = Path(__file__).parents[1] / 'configs'
RECIPES = sorted(
    path for path in (CONFIGS / 'actnn').glob('*.py') if path.is_file()
)


def load(path):
    config = Config.fromfile(path)
    # Pretrained weights are for the runner to load, and are not here.
    config.model.backbone.init_cfg = None
    config.model.pop('pretrained', None)
    return config


def build_model(config):
    scope = config.default_scope
    if scope == 'mmpretrain':
        make_torchvision_importable()
    import_modules_from_strings(f'{scope}.models')
    # Only the classes of the layers matter here; but ResNets of MMPretrain
    # want numbers when they are built.
    device = torch.device('cpu' if scope == 'mmpretrain' else 'meta')
    with DefaultScope.overwrite_default_scope(scope), device:
        return MODELS.build(config.model)


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {
        *OFFICIAL,
        'faster_rcnn_r50_bccd',
        'faster_rcnn_r50_paper',
        'retinanet_r18_digits',
        'retinanet_r50_bccd',
        'retinanet_r50_paper',
    }


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_with_compressed_layers(path):
    config = load(path)
    assert config.custom_hooks[0].type == 'ActNNHook'
    model = build_model(config)
    layers = [
        m for m in model.modules() if isinstance(m, mmactnn.QuantizedLayer)
    ]
    # The hook finds what no option reaches and leaves nothing of these.
    mmactnn.convert_model(model, config.custom_hooks[0].level)
    names = {type(m).__name__ for m in model.modules()}
    assert layers
    assert not names & {'Conv2d', 'BatchNorm2d', 'ReLU'}


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_exact_twin_is_one_override(path):
    config = load(path)
    config.merge_from_dict({'custom_hooks.0.level': 'L0'})
    model = build_model(config)
    mmactnn.convert_model(model, config.custom_hooks[0].level)
    layers = [
        m for m in model.modules() if isinstance(m, mmactnn.QuantizedLayer)
    ]
    assert layers and all(layer.quantizer.exact for layer in layers)


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_recipe_is_untouched(name):
    stock, ours = official(name), Config.fromfile(f'{CONFIGS}/actnn/{name}.py')
    hook, *others = ours.pop('custom_hooks')
    assert hook == dict(type='ActNNHook', level='L3')
    assert others == stock.pop('custom_hooks', [])
    ours.pop('custom_imports'), ours.pop('actnn', None)
    # All that differs is which layers are built, and the hook.
    model, expected = plain(ours.pop('model')), stock.pop('model').to_dict()
    if name in ('atss_r50', 'fcos_r50'):
        # What is the default there has to be named here.
        norm_cfg = model['bbox_head'].pop('norm_cfg')
        assert norm_cfg == dict(type='GN', num_groups=32, requires_grad=True)
    assert model == expected
    assert ours.to_dict() == stock.to_dict()


@pytest.mark.parametrize(
    'name', ['faster_rcnn_r50_paper', 'retinanet_r50_paper']
)
def test_paper_recipe_trains_everything(name):
    config = load(CONFIGS / f'actnn/{name}.py')
    assert config.train_dataloader.batch_size == 16
    model = build_model(config)
    model.train()
    assert all(p.requires_grad for p in model.parameters())
    assert all(
        m.training for m in model.modules() if isinstance(m, _BatchNorm)
    )


def test_base_mixes_into_a_config_with_a_norm_cfg_of_its_own(tmp_path):
    (tmp_path / 'fcn.py').write_text(
        f"""_base_ = ['mmseg::_base_/models/fcn_r50-d8.py',
                      {str(CONFIGS / '_base_/actnn.py')!r}]
model = dict(backbone=dict(norm_cfg=_base_.actnn.norm_cfg))
"""
    )
    config = Config.fromfile(tmp_path / 'fcn.py')
    assert config.model.backbone.norm_cfg.type == 'QBN2d'
    assert config.model.decode_head.norm_cfg.type == 'SyncBN'
    assert config.custom_hooks[0].type == 'ActNNHook'


def test_model_index_names_what_there_is():
    root = CONFIGS.parent
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    named = set()
    for metafile in index['Import']:
        models = yaml.safe_load((root / metafile).read_text())['Models']
        named |= {root / model['Config'] for model in models}
    assert named == set(RECIPES)
