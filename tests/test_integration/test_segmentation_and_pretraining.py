"""Shipped configs of MMSegmentation and MMPretrain on small data."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from support.recipes import (
    build,
    list_recipes,
    load_recipe,
    measure_kept,
    name_stock_layers,
    official_path,
    shrink,
    train,
    without_layer_types,
)
from support.tools import ROOT, load_tool
from support.torchvision_stub import make_torchvision_importable

from mmactnn import QuantizedLayer

RECIPES = [
    *list_recipes('metafile_segmentation.yml'),
    *list_recipes('metafile_pretrain.yml'),
]


@pytest.fixture(scope='module')
def data(digits_home, tmp_path_factory):
    """A tiny set for each toolbox."""
    classes = tmp_path_factory.mktemp('classes')
    converter = load_tool('dataset_converters/digits.py')
    options = [str(classes), '--layout', 'classes', '--image-size', '64']
    options += ['--num-train', '16', '--num-val', '4']
    converter.make_dataset(converter.parse_args(options))
    return dict(mmseg=digits_home / 'data' / 'digits', mmpretrain=classes)


@pytest.fixture(autouse=True)
def plain_text_of_configs(monkeypatch):
    """Runners format their configs, which takes as long as the training."""
    monkeypatch.setattr(Config, 'pretty_text', property(str))


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe(path, data, tmp_path):
    """Trains, is evaluated, and is the stock one but for what it keeps."""
    config = shrink(load_recipe(path), data, tmp_path / path.stem, 3)
    ours = train(build(config))
    assert len(ours.losses) == 3
    assert all(math.isfinite(loss) for loss in ours.losses)
    if config.get('val_evaluator') is not None:
        assert all(math.isfinite(value) for value in ours.metrics.values())
    kept = measure_kept(ours.runner)
    assert kept.rest <= 0.1 * kept.exact, kept
    assert kept.averages == 0

    config = shrink(
        load_recipe(path), data, tmp_path / f'{path.stem}-stock', 1
    )
    name_stock_layers(config.model)
    for part in ('dataloader', 'cfg', 'evaluator'):
        config[f'val_{part}'] = None
    config.default_hooks.checkpoint = None
    runner = build(config)
    stock = runner.model
    assert not any(isinstance(m, QuantizedLayer) for m in stock.modules())
    load_checkpoint(stock, ours.checkpoint, strict=True)
    ours.runner.model.load_state_dict(stock.state_dict(), strict=True)
    hooked = train(runner)
    assert hooked.saved_mib == ours.saved_mib
    assert hooked.exact_mib == ours.exact_mib > 4 * ours.saved_mib


@pytest.mark.parametrize(
    'path',
    [path for path in RECIPES if official_path(path)],
    ids=lambda path: path.stem,
)
def test_official_recipe_is_untouched(path):
    ours = without_layer_types(Config.fromfile(path).to_dict())
    for key in ('actnn', 'custom_hooks', 'custom_imports'):
        ours.pop(key)
    # Read as it lies, without the scope that inheriting notes everywhere.
    official = Config.fromfile(official_path(path))
    assert ours == without_layer_types(official.to_dict())


@pytest.mark.parametrize('name', ['fcn_r50', 'sem_fpn_r50'])
def test_paper_recipe_of_segmentors(name):
    folder = ROOT / 'configs/actnn'
    official = Config.fromfile(folder / f'{name}.py')
    paper = Config.fromfile(folder / f'{name}_paper.py')
    assert paper.train_dataloader.batch_size == 8
    assert paper.optim_wrapper.pop('clip_grad').max_norm == 35
    official.optim_wrapper.pop('clip_grad')
    assert paper.optim_wrapper == official.optim_wrapper
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        if part in official.model:
            assert official.model[part].norm_cfg.type == 'QSyncBN'
            assert paper.model[part].norm_cfg.type == 'QBN2d'


def test_linear_probe_of_a_pretrained_backbone(data, tmp_path, monkeypatch):
    """Pretrain, probe and test, through the tools."""
    make_torchvision_importable()
    monkeypatch.chdir(tmp_path)
    Path('data').mkdir()
    Path('data/digits_classes').symlink_to(data['mmpretrain'])

    def train_recipe(name, *options):
        load_tool('train.py').main(
            [
                str(ROOT / f'configs/actnn/{name}.py'),
                *('--work-dir', name, '--cfg-options'),
                *('train_cfg.max_epochs=1', 'train_dataloader.batch_size=8'),
                *('train_dataloader.num_workers=0', 'log_level=ERROR'),
                *options,
            ]
        )
        path = f'{name}/epoch_1.pth'
        return path, torch.load(path, weights_only=False)['state_dict']

    pretrained, encoder = train_recipe(
        'mocov2_r18_digits',
        'train_dataloader.persistent_workers=False',
        'model.queue_len=16',
    )
    probed, classifier = train_recipe(
        'linear_probe_r18_digits',
        f'model.backbone.init_cfg.checkpoint={pretrained}',
    )
    frozen = [key for key in classifier if key.startswith('backbone.')]
    assert frozen
    assert all(torch.equal(classifier[key], encoder[key]) for key in frozen)

    load_tool('test.py').main(
        [
            str(ROOT / 'configs/actnn/linear_probe_r18_digits.py'),
            *(probed, '--work-dir', 'tested', '--out', 'predictions.pkl'),
        ]
    )
    with open('predictions.pkl', 'rb') as file:
        assert len(pickle.load(file)) == 4
    (scalars,) = Path('tested').glob('*/*.json')
    assert 0 <= json.loads(scalars.read_text())['accuracy/top1'] <= 100
