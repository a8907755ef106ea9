"""Recipes of segmentors, run on a few small images."""

from support.recipe_tests import RecipeTests
from support.small_recipe import list_recipes


class TestSegmentation(RecipeTests):
    toolbox = 'mmseg'
    recipes = list_recipes('metafile_segmentation.yml')
