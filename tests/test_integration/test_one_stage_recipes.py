"""Recipes of detectors without proposals, run on a few small images."""

import pytest
from support.recipe_tests import RecipeTests
from support.small_recipe import list_detectors


@pytest.mark.parametrize('name', list_detectors(1), scope='class')
class TestOneStageDetection(RecipeTests):
    toolbox = 'mmdet'

    def test_metrics(self, run):
        assert 'val/coco/bbox_mAP' in run.scalars
        assert 'val/coco/segm_mAP' not in run.scalars
