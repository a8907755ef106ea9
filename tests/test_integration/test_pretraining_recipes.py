"""Recipes of classifiers and encoders, run on a few small images."""

import pytest
from support.recipe_tests import RecipeTests
from support.small_recipe import list_recipes


@pytest.mark.parametrize(
    'name', list_recipes('metafile_pretrain.yml'), scope='class'
)
class TestPretraining(RecipeTests):
    toolbox = 'mmpretrain'
