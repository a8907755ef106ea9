"""Recipes of detectors with proposals, run on a few small images."""

from support.recipe_tests import RecipeTests
from support.small_recipe import list_detectors


class TestTwoStageDetection(RecipeTests):
    toolbox = 'mmdet'
    recipes = list_detectors(2)

    def test_metrics(self, run):
        assert 'val/coco/bbox_mAP' in run.scalars
        masks = 'val/coco/segm_mAP' in run.scalars
        assert masks == run.name.startswith('mask')
