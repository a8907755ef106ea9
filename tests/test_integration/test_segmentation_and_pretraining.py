"""Shipped configs of MMSegmentation and MMPretrain on small data."""

import math

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
    official_base,
    shrink,
    train,
    without_layer_types,
)
from support.tools import load_tool

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


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe(path, data, tmp_path):
    config = shrink(load_recipe(path), data, tmp_path / path.stem, 3)
    ours = train(build(config))
    assert len(ours.losses) == 3
    assert all(math.isfinite(loss) for loss in ours.losses)
    if config.get('val_evaluator') is not None:
        assert all(math.isfinite(value) for value in ours.metrics.values())
    kept = measure_kept(ours.runner)
    assert kept.rest <= 0.1 * kept.exact

    config = shrink(load_recipe(path), data, tmp_path / 'stock', 1)
    name_stock_layers(config.model)
    for part in ('dataloader', 'cfg', 'evaluator'):
        config[f'val_{part}'] = None
    config.default_hooks.checkpoint = None
    runner = build(config)
    assert not any(
        isinstance(m, QuantizedLayer) for m in runner.model.modules()
    )
    load_checkpoint(runner.model, ours.checkpoint, strict=True)
    ours.runner.model.load_state_dict(runner.model.state_dict(), strict=True)
    hooked = train(runner)
    assert hooked.saved_mib == ours.saved_mib
    assert hooked.exact_mib == ours.exact_mib
    assert hooked.saved_mib < hooked.exact_mib / 4
    print(
        path.stem,
        kept,
        kept.rest / kept.exact,
        hooked.saved_mib,
        hooked.exact_mib,
        ours.metrics,
        ours.losses,
    )
