"""Every detection recipe, run as it is on a few small images."""

import math

import pytest
import torch
from mmengine.config import ConfigDict
from support.small_run import IMAGE_SIZE, ITERATIONS, run_recipe
from support.stock import OFFICIAL, official, plain
from support.tools import ROOT, load_tool
from torch import nn

from mmactnn import QuantizedLayer, convert_model, revert_model
from mmactnn.models import find_layered

CONFIGS = ROOT / 'configs' / 'actnn'
OTHERS = {
    'faster_rcnn_r50_bccd',
    'faster_rcnn_r50_paper',
    'retinanet_r18_digits',
    'retinanet_r50_bccd',
    'retinanet_r50_paper',
}
NAMES = sorted(OTHERS | set(OFFICIAL))


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A directory to run in: it holds digits in the shape of COCO."""
    home = tmp_path_factory.mktemp('coco')
    converter = load_tool('dataset_converters/digits.py')
    options = [str(home / 'data' / 'coco'), '--layout', 'coco']
    options += ['--image-size', str(IMAGE_SIZE)]
    options += ['--num-train', str(2 * ITERATIONS), '--num-val', '2']
    converter.make_dataset(converter.parse_args(options))
    return home


@pytest.fixture(scope='module', params=NAMES)
def run(request, home):
    return run_recipe(CONFIGS / f'{request.param}.py', home)


@pytest.fixture(scope='module')
def stock(run):
    """The model of the stock recipe, with the weights that were trained."""
    name = run.config.experiment_name
    config = run.config.model
    if name in OFFICIAL:
        config = official(name).model
    model = run.build(ConfigDict(plain(config)))
    model.load_state_dict(run.checkpoint['state_dict'], strict=True)
    return model


def test_trains_and_evaluates(run):
    losses = run.scalars['train/loss']
    assert len(losses) == ITERATIONS
    assert all(math.isfinite(loss) for loss in losses)
    assert 'val/coco/bbox_mAP' in run.scalars
    masks = 'val/coco/segm_mAP' in run.scalars
    assert masks == run.config.experiment_name.startswith('mask')


def test_hook_converts(run):
    # What is left of these would be activations kept in full.
    left = {type(m) for m in run.model.modules()}
    assert not left & {
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        nn.GroupNorm,
        nn.Linear,
        nn.ReLU,
        nn.SiLU,
        nn.Dropout,
    }
    assert 'Swish' not in {cls.__name__ for cls in left}
    assert not find_layered(run.model)
    layers = [m for m in run.model.modules() if isinstance(m, QuantizedLayer)]
    assert not any(layer.quantizer.exact for layer in layers)


def test_checkpoints(run, stock):
    """The trained weights are in the stock model; and the way back."""
    state = run.checkpoint['state_dict']
    assert list(stock.state_dict()) == list(state)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(1)
    run.model.load_state_dict(stock.state_dict(), strict=True)
    found = run.model.state_dict()
    assert all(
        torch.equal(found[key], value)
        for key, value in stock.state_dict().items()
    )
    for model in (stock, run.model):
        model.load_state_dict(state, strict=True)


def test_hook_alone_keeps_as_little(run, stock):
    """Which types a config names makes no difference to what is kept."""
    level = run.config.custom_hooks[0].level
    for model in (run.model, stock):
        # Bits that were shared out anew start as they did at first.
        convert_model(model, level)
    ours, alone = run.measure(run.model), run.measure(stock)
    assert alone.saved_bytes == ours.saved_bytes
    assert alone.exact_bytes == ours.exact_bytes
    assert ours.layers_ratio > 10


def test_what_is_left(run):
    places = run.places(run.model)
    kept = places.layers + places.others_bytes
    share = places.others_bytes / kept
    if run.config.experiment_name == 'detr_r50':
        # Attention and layer normalisation.
        assert 0.8 < share < 0.95
        exact = run.measure(run.model).exact_bytes - places.losses
        assert places.others_bytes < 0.35 * exact
    else:
        assert share <= 0.1, places.others.most_common(5)


def test_exact_level_and_the_way_back(run, stock):
    """Last, because it leaves plain models behind."""
    revert_model(stock)
    expected = run.loss(stock)
    expected.backward()
    convert_model(run.model, 'L0')
    found = run.loss(run.model)
    found.backward()
    assert torch.equal(found, expected)
    for ours, theirs in zip(run.model.parameters(), stock.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    revert_model(run.model)
    classes = [type(module) for module in run.model.modules()]
    assert classes == [type(module) for module in stock.modules()]
