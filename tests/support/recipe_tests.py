"""Tests of all shipped recipes, of any toolbox."""

import math

import pytest
import torch
from mmengine.model import BaseAveragedModel
from torch import nn

from mmactnn import QuantizedLayer, convert_model, revert_model
from mmactnn.adapters import find_adapters
from mmactnn.memory import Category

from .recipe_run import run_recipe
from .small_recipe import ALIKE, ITERATIONS, make_data, shallow_resnets
from .torchvision_stub import make_torchvision_importable


class RecipeTests:
    """Base of classes, each run with its recipes one after the other.

    Attributes:
        toolbox (str): Whose recipes: ``'mmdet'``, ``'mmseg'`` or
            ``'mmpretrain'``.
        recipes (list[str]): Their names.
        alike (set[str]): Those that only ``--full`` trains.
    """

    alike = ALIKE

    @pytest.fixture(scope='class')
    def data(self, tmp_path_factory):
        """A tiny set of images."""
        folder = tmp_path_factory.mktemp('images') / self.toolbox
        make_data(self.toolbox, folder)
        return folder

    @pytest.fixture(scope='class', autouse=True)
    def _shallow_resnets(self):
        if self.toolbox == 'mmpretrain':
            make_torchvision_importable()
        with shallow_resnets(self.toolbox):
            yield

    @pytest.fixture(scope='class')
    def run(self, name, data, tmp_path_factory):
        return run_recipe(name, data, tmp_path_factory.mktemp('runs'))

    @pytest.fixture(scope='class')
    def stock(self, run):
        return run.build_stock()

    @pytest.fixture(scope='class')
    def kept(self, run):
        """Memory of the trained model: in all, and by places."""
        # Bits that were shared out anew start as they did at first.
        convert_model(run.model, run.config.custom_hooks[0].level)
        return run.measure(run.model)

    def test_trains_and_evaluates(self, run):
        assert len(run.scalars['train/loss']) == ITERATIONS
        finite = {
            key: all(map(math.isfinite, values))
            for key, values in run.scalars.items()
            if key.startswith('val/') or key == 'train/loss'
        }
        assert all(finite.values()), finite
        evaluates = run.config.get('val_evaluator') is not None
        assert evaluates == any(key.startswith('val/') for key in finite)

    def test_hook_measures(self, run):
        exact, saved = (
            run.scalars[f'train/actnn/{key}_mib'][0]
            for key in ('exact', 'saved')
        )
        assert exact > 0 < saved

    def test_hook_converts(self, run):
        # Uncompressed tensors of these would be whole activations.
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
        assert not find_adapters(run.model).plans
        layers = [
            m for m in run.model.modules() if isinstance(m, QuantizedLayer)
        ]
        assert layers
        assert not any(layer.quantizer.exact for layer in layers)

    def test_checkpoints(self, run, stock):
        """The trained weights are in the stock model; and the way back."""
        assert not any(isinstance(m, QuantizedLayer) for m in stock.modules())
        assert list(stock.state_dict()) == list(run.state)
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
            model.load_state_dict(run.state, strict=True)

    def test_hook_alone_keeps_as_little(self, run, stock, kept):
        """Memory does not depend on the types that a config names."""
        convert_model(stock, run.config.custom_hooks[0].level)
        ours, _ = kept
        alone, _ = run.measure(stock)
        # But for codes of the few samples that training has moved.
        assert alone.saved_bytes == pytest.approx(ours.saved_bytes, rel=1e-4)
        assert alone.exact_bytes == ours.exact_bytes
        assert ours.layers_ratio > 10

    def test_what_is_left(self, run, kept):
        _, parts = kept
        # But for the statistics of norms, which weigh more in small images.
        left = [
            part
            for part in parts.entries
            if part.category is Category.LEFT and part.note != 'statistics'
        ]
        losses = parts.kept_in(Category.LOSS)
        share = sum(part.kept_bytes for part in left)
        share /= parts.kept_bytes - losses
        assert share <= 0.1, left[:5]

    def test_averages_keep_nothing(self, run, kept):
        _, parts = kept
        averages = tuple(
            f'{name}.'
            for name, module in run.model.named_modules()
            if isinstance(module, BaseAveragedModel)
        )
        assert not any(
            part.kept_bytes
            for part in parts.entries
            if f'{part.module}.'.startswith(averages)
        )

    def test_exact_level_and_the_way_back(self, run, stock):
        """Last, because it leaves plain models behind."""
        revert_model(stock)
        convert_model(run.model, 'L0')
        for model in (stock, run.model):
            # Queues and moving averages have moved on.
            model.load_state_dict(run.state, strict=True)
        expected = run.loss(stock)
        expected.backward()
        found = run.loss(run.model)
        found.backward()
        assert torch.equal(found, expected)
        for ours, theirs in zip(run.model.parameters(), stock.parameters()):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
        revert_model(run.model)
        classes = [type(module) for module in run.model.modules()]
        assert classes == [type(module) for module in stock.modules()]
