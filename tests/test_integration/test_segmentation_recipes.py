"""Recipes of segmentors, run on a few small images."""

import pytest
from support.recipe_tests import RecipeTests
from support.small_recipe import list_recipes


@pytest.mark.parametrize(
    'name', list_recipes('metafile_segmentation.yml'), scope='class'
)
class TestSegmentation(RecipeTests):
    toolbox = 'mmseg'
