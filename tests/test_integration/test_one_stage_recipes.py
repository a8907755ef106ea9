"""Recipes of detectors without proposals, run on a few small images."""

from support.recipe_tests import RecipeTests
from support.small_recipe import list_detectors


class TestOneStageDetection(RecipeTests):
    toolbox = 'mmdet'
    recipes = list_detectors(1)

    def test_metrics(self, run):
        assert 'val/coco/bbox_mAP' in run.scalars
        assert 'val/coco/segm_mAP' not in run.scalars
