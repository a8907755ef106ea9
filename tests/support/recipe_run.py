"""Runs a shipped recipe in small, and compares models on what it read."""

import copy
import dataclasses
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmactnn import measure_activations
from mmactnn.memory import Breakdown, Locator
from mmactnn.mmlab.launch import build_runner

from .small_recipe import load_recipe, shrink, shrink_model
from .stock import OFFICIAL, official, plain


@dataclasses.dataclass
class RecipeRun:
    """A recipe that ran, and models to compare with.

    Attributes:
        name (str): Of the recipe.
        config (Config): What ran.
        model (nn.Module): The model that was trained.
        scalars (dict[str, list[float]]): All that was logged, by key.
        state (dict[str, Tensor]): The model, as it was saved at the end.
        batch (dict): A batch of training data.
    """

    name: str
    config: Config
    model: nn.Module
    scalars: dict
    state: dict
    batch: dict

    def build_stock(self):
        """Build the model of the stock recipe with the trained weights.

        Returns:
            nn.Module: In training mode, without compressed layers.
        """
        toolbox = self.config.default_scope
        config = self.config
        if self.name in OFFICIAL:
            config = official(self.name)
            config.model = shrink_model(config.model, toolbox)
        preprocessor = config.get('data_preprocessor')
        config = ConfigDict(plain(config.model))
        # As the runner does ...
        config.setdefault('data_preprocessor', preprocessor)
        with DefaultScope.overwrite_default_scope(toolbox):
            model = MODELS.build(config)
        # ... in one process.
        model = revert_sync_batchnorm(model).train()
        model.load_state_dict(self.state, strict=True)
        return model

    def loss(self, model):
        """The loss of the batch, all random numbers being those of a seed.

        Args:
            model (nn.Module): The model.

        Returns:
            Tensor: Scalar.
        """
        model.train()
        torch.manual_seed(0)
        np.random.seed(0)
        data = model.data_preprocessor(copy.deepcopy(self.batch), True)
        return model.parse_losses(model(**data, mode='loss'))[0]

    def measure(self, model):
        """Measure the memory that a model keeps of the batch.

        Args:
            model (nn.Module): The model.

        Returns:
            tuple[ActivationMeter, Breakdown]: In all, and by places.
        """
        with measure_activations(model, Locator(model)) as meter:
            self.loss(model)
        return meter, Breakdown.of(meter, model)


def run_recipe(name, data, folder):
    """Train, evaluate and save a recipe.

    Args:
        name (str): Of the recipe.
        data (Path): See :func:`support.small_recipe.shrink`.
        folder (Path): Holds work directories of runs.

    Returns:
        RecipeRun: What came out.
    """
    with pytest.MonkeyPatch.context() as patch:
        # No scope of an earlier run, and none left behind.
        patch.setattr(DefaultScope, '_instance_dict', OrderedDict())
        config = shrink(load_recipe(name), data, folder / name)
        runner = build_runner(config)
        runner.train()
        batch = next(iter(runner.train_dataloader))
    scalars = {
        key: [float(value) for value in buffer.data[0]]
        for key, buffer in runner.message_hub.log_scalars.items()
    }
    saved = Path(runner.work_dir, 'last_checkpoint').read_text()
    state = torch.load(saved, map_location='cpu', weights_only=False)
    return RecipeRun(
        name, config, runner.model, scalars, state['state_dict'], batch
    )
