"""Recipes of classifiers and encoders, run on a few small images."""

from support.recipe_tests import RecipeTests
from support.small_recipe import list_recipes


class TestPretraining(RecipeTests):
    toolbox = 'mmpretrain'
    recipes = list_recipes('metafile_pretrain.yml')
