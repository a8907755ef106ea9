"""The configs that are shipped."""

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from support.small_recipe import (
    ALIKE,
    CONFIGS,
    load_recipe,
    prepare_imports,
    shallow_resnets,
)
from support.stock import OFFICIAL, official, plain
from support.tools import ROOT
from torch.nn.modules.batchnorm import _BatchNorm

import mmactnn
from mmactnn.mmlab.synthetic import drop_pretrained

RECIPES = sorted(path.stem for path in CONFIGS.glob('*.py'))

# Of the architectures that no test trains by their recipes.
SMALLEST = {
    'deformable_detr_r50',
    'mobilenet_v3_in1k',
    'segformer_b0',
    'swin_cifar10',
    'vit_cifar10',
}

NORMS = ('BN', 'SyncBN', 'GN')
# Types of layers that a recipe has to name where the stock one leaves them at
# their default.
UNNAMED = {
    'atss_r50': [dict(type='GN', num_groups=32)],
    'byol_r50': [dict(type='SyncBN')],
    'deeplabv3plus_r50': [dict(type='ReLU')],
    'fcn_hr48': [dict(type='ReLU')],
    'fcn_r50': [dict(type='ReLU')],
    'fcos_r50': [dict(type='GN', num_groups=32)],
    'pspnet_r50': [dict(type='ReLU')],
    'resnet50_cifar10': [dict(type='BN')],
    'resnet50_in1k': [dict(type='BN')],
    'sem_fpn_r50': [dict(type='ReLU')],
    'simclr_r50': [dict(type='SyncBN')],
    'segformer_b0': [dict(type='ReLU')],
    'segformer_b2': [dict(type='ReLU')],
    'upernet_r50': [dict(type='ReLU')],
    'upernet_swin_t': [dict(type='ReLU')],
}


def build_model(config):
    scope = config.default_scope
    # Pretrained weights are for the runner to load, and are not here.
    drop_pretrained(config.model)
    import_modules_from_strings(f'{scope}.models')
    # Only the classes of the layers matter here; but ResNets of MMPretrain
    # and most other backbones want numbers when they are built.
    is_resnet = scope != 'mmpretrain' and 'depth' in config.model.backbone
    device = torch.device('meta' if is_resnet else 'cpu')
    scope = DefaultScope.overwrite_default_scope(scope)
    with scope, shallow_resnets(config.default_scope), device:
        return MODELS.build(config.model)


def test_there_are_recipes():
    assert set(RECIPES) >= {
        *OFFICIAL,
        'faster_rcnn_r50_bccd',
        'faster_rcnn_r50_paper',
        'retinanet_r18_digits',
        'retinanet_r50_bccd',
        'retinanet_r50_paper',
    }


@pytest.mark.parametrize(
    'name',
    [
        # What is trained in test_integration is built there.
        pytest.param(
            name, marks=[pytest.mark.full] * (name not in ALIKE | SMALLEST)
        )
        for name in RECIPES
    ],
)
def test_recipe_builds_with_compressed_layers(name):
    config = load_recipe(name)
    assert config.custom_hooks[0].type == 'ActNNHook'
    model = build_model(config)
    named = any(isinstance(m, mmactnn.QuantizedLayer) for m in model.modules())
    # Some leave all of it to the hook.
    assert named == ("'Q" in str(config.model.to_dict()))
    # The hook finds what no option reaches and leaves nothing of these.
    mmactnn.convert_model(model, config.custom_hooks[0].level)
    names = {type(m).__name__ for m in model.modules()}
    assert not names & {'Conv2d', 'BatchNorm2d', 'ReLU'}
    # The exact twin is one override.
    config.merge_from_dict({'custom_hooks.0.level': 'L0'})
    mmactnn.convert_model(model, config.custom_hooks[0].level)
    layers = [
        m for m in model.modules() if isinstance(m, mmactnn.QuantizedLayer)
    ]
    assert layers and all(layer.quantizer.exact for layer in layers)


def without_defaults(node):
    """Without what is the default of a norm, and scopes noted by MMEngine."""
    if isinstance(node, dict):
        found = {
            key: without_defaults(value)
            for key, value in node.items()
            if key != '_scope_'
        }
        if found.get('type') in NORMS and found.get('requires_grad'):
            del found['requires_grad']
        return found
    if isinstance(node, (list, tuple)):
        return type(node)(without_defaults(item) for item in node)
    return node


def pop_unnamed_layers(ours, stock):
    """Remove types of layers that only one of two models names.

    Args:
        ours (dict): Its config; changed in place.
        stock (dict): The config of the other model.

    Returns:
        list[dict]: The types.
    """
    types = [
        ours.pop(key)
        for key in ('norm_cfg', 'act_cfg')
        if key in ours and key not in stock
    ]
    for key in ours.keys() & stock.keys():
        if isinstance(ours[key], dict) and isinstance(stock[key], dict):
            types += pop_unnamed_layers(ours[key], stock[key])
    return types


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_recipe_is_untouched(name):
    prepare_imports(name)
    stock = official(name).to_dict()
    ours = Config.fromfile(CONFIGS / f'{name}.py').to_dict()
    hook, *others = ours.pop('custom_hooks')
    assert hook == dict(type='ActNNHook', level='L3')
    assert others == stock.pop('custom_hooks', [])
    imports = ours.pop('custom_imports')['imports']
    others = stock.pop('custom_imports', dict(imports=[]))['imports']
    assert imports == ['mmactnn', *np.atleast_1d(others)]
    ours.pop('actnn', None)
    # All that differs is which layers are built, and the hook.
    model = without_defaults(plain(ours.pop('model')))
    expected = without_defaults(stock.pop('model'))
    # Layers that are defaults upstream have to be named here.
    for default in pop_unnamed_layers(model, expected):
        assert default in UNNAMED.get(name, [])
    assert model == expected
    assert without_defaults(ours) == without_defaults(stock)


@pytest.mark.parametrize(
    'name', ['faster_rcnn_r50_paper', 'retinanet_r50_paper']
)
def test_paper_recipe_trains_everything(name):
    config = load_recipe(name)
    assert config.train_dataloader.batch_size == 16
    model = build_model(config)
    model.train()
    assert all(p.requires_grad for p in model.parameters())
    assert all(
        m.training for m in model.modules() if isinstance(m, _BatchNorm)
    )


def test_cifar10_recipe_is_the_stock_one_shortened():
    stock, ours = (
        Config(without_defaults(plain(config.to_dict())))
        for config in (
            Config.fromstring(
                "_base_ = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'",
                '.py',
            ),
            Config.fromfile(CONFIGS / 'resnet18_cifar10.py'),
        )
    )
    pop_unnamed_layers(ours.model, stock.model)
    assert ours.model == stock.model
    assert ours.optim_wrapper == stock.optim_wrapper
    batch_size = stock.auto_scale_lr.base_batch_size
    assert ours.train_dataloader.batch_size == batch_size
    assert ours.train_cfg.max_epochs * 10 == stock.train_cfg.max_epochs
    schedule = ours.param_scheduler
    schedule.milestones = [10 * epoch for epoch in schedule.milestones]
    assert schedule == stock.param_scheduler
    for name in ('train_dataloader', 'val_dataloader'):
        pipeline = stock[name].dataset.pipeline
        assert ours[name].dataset.pipeline == pipeline


@pytest.mark.parametrize('name', ['fcn_r50', 'sem_fpn_r50'])
def test_paper_recipe_of_segmentors(name):
    stock, paper = load_recipe(name), load_recipe(f'{name}_paper')
    assert paper.train_dataloader.batch_size == 8
    assert paper.optim_wrapper.pop('clip_grad').max_norm == 35
    stock.optim_wrapper.pop('clip_grad')
    assert paper.optim_wrapper == stock.optim_wrapper
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        if part in stock.model:
            assert stock.model[part].norm_cfg.type == 'QSyncBN'
            assert paper.model[part].norm_cfg.type == 'QBN2d'


def test_base_mixes_into_a_config_with_a_norm_cfg_of_its_own(tmp_path):
    (tmp_path / 'fcn.py').write_text(
        f"""_base_ = ['mmseg::_base_/models/fcn_r50-d8.py',
                      {str(CONFIGS.parent / '_base_/actnn.py')!r}]
model = dict(backbone=dict(norm_cfg=_base_.actnn.norm_cfg))
"""
    )
    config = Config.fromfile(tmp_path / 'fcn.py')
    assert config.model.backbone.norm_cfg.type == 'QBN2d'
    assert config.model.decode_head.norm_cfg.type == 'SyncBN'
    assert config.custom_hooks[0].type == 'ActNNHook'


def test_model_index_names_what_there_is():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    named = set()
    for metafile in index['Import']:
        models = yaml.safe_load((ROOT / metafile).read_text())['Models']
        named |= {ROOT / model['Config'] for model in models}
    assert named == {CONFIGS / f'{name}.py' for name in RECIPES}
